"""The headers of a named guest kernel, with stand-ins for the package client."""

import pytest
from kernel_host import KernelHost

from hypervisor import cli, kernels
from hypervisor.errors import ConfigError, HostError
from hypervisor.kernels import headers

RELEASE = "6.1.0-9-cloud-amd64"
VERSION = "6.1.9-1"
BUILD = f"usr/src/linux-headers-{RELEASE}"
COMMON = "usr/src/linux-headers-6.1.0-9-common"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trapvisor" / "headers"


@pytest.fixture
def host(tmp_path, monkeypatch, cache):
    host = KernelHost(tmp_path / "host")
    monkeypatch.setenv("PATH", host.path)
    monkeypatch.setenv("HOST", str(host.folder))
    for program in ("make", "gcc", "gcc-12"):
        host.tool(program)
    offer_kernel(host)
    kernels.get("debian")
    return host


def offer_kernel(host, version=VERSION, release=RELEASE):
    files = {f"boot/vmlinuz-{release}": b"MZ", f"lib/modules/{release}/modules.builtin": b""}
    host.package("linux-image-cloud-amd64", version, {}, depends=f"linux-image-{release}")
    host.package(f"linux-image-{release}", version, files)


def offer_headers(host, version=VERSION, release=RELEASE, **keywords):
    build, common = f"usr/src/linux-headers-{release}", COMMON
    host.package(
        f"linux-headers-{release}",
        version,
        {
            f"{build}/Makefile": b"include /usr/src/linux-headers-6.1.0-9-common/Makefile\n",
            f"{build}/.kernelvariables": b"CC = $(CROSS_COMPILE)gcc-12\n",
            f"{build}/Module.symvers": b"0x00000000\tprintk\tvmlinux\tEXPORT_SYMBOL\t\n",
            f"{build}/.config": b"CONFIG_MODULES=y\n",
            "usr/share/doc/x": b"x",
        },
        depends="linux-headers-6.1.0-9-common (= 6.1.9-1), linux-kbuild-6.1 (>= 6.1.9-1), linux-compiler-gcc-12-x86",
        **keywords,
    )
    shared = {f"{common}/Makefile": b"all:\n", f"{common}/arch/x86/Makefile": b"", f"{common}/arch/arm/Makefile": b""}
    host.package("linux-headers-6.1.0-9-common", version, shared, **keywords)
    host.package("linux-kbuild-6.1", version, {"usr/lib/linux-kbuild-6.1/scripts/mod/modpost": b"ELF"}, **keywords)


def downloads(host):
    return [call for call in host.calls() if call.startswith("apt-get download") and "headers" in call]


def test_all_that_the_headers_are_made_up_with_is_laid_out(host, cache):
    offer_headers(host)
    folder = headers.ensure("debian")
    root = folder.parents[2]
    assert root.parent == cache / "debian"
    assert folder == root / BUILD
    assert (root / "usr/lib/linux-kbuild-6.1/scripts/mod/modpost").is_file()
    assert (root / COMMON / "arch/x86").is_dir()
    assert not (root / COMMON / "arch/arm").exists()
    assert not (root / "usr/share").exists()


def test_the_makefile_finds_the_shared_one_wherever_the_cache_is(host):
    offer_headers(host)
    text = (headers.ensure("debian") / "Makefile").read_text()
    assert "include /usr" not in text
    assert text.endswith("../linux-headers-6.1.0-9-common/Makefile\n")


def test_they_are_fetched_once(host):
    offer_headers(host)
    assert headers.ensure("debian") == headers.ensure("debian")
    assert len(downloads(host)) == 2  # one asked for the size, one was the fetch


@pytest.mark.parametrize(("inside", "check"), [("Module.symvers", False), (".kernelvariables", True)])
def test_damage_is_mended(host, inside, check):
    offer_headers(host)
    file = headers.ensure("debian") / inside
    text = file.read_text()
    file.write_text("?")
    assert (headers.ensure("debian", check=check) / inside).read_text() == text


def test_what_no_build_reads_first_is_only_checked_when_asked(host):
    offer_headers(host)
    (headers.ensure("debian") / ".kernelvariables").write_text("gcc-12 ?")
    headers.ensure("debian")
    assert len(downloads(host)) == 2


def test_another_kernel_needs_other_headers(host):
    offer_headers(host)
    headers.ensure("debian")
    offer_kernel(host, "6.1.10-1", "6.1.0-10-cloud-amd64")
    kernels.get("debian", update=True)
    offer_headers(host, "6.1.10-1", "6.1.0-10-cloud-amd64")
    assert headers.ensure("debian").name == "linux-headers-6.1.0-10-cloud-amd64"


def test_lists_that_name_another_version_are_fetched(host):
    offer_headers(host, version="6.1.9-0")
    offer_headers(host, lists="mirror-lists")
    assert headers.ensure("debian").name == f"linux-headers-{RELEASE}"


def test_lists_that_are_too_old_are_fetched(host):
    offer_headers(host, lists="mirror-lists")
    assert headers.ensure("debian").name == f"linux-headers-{RELEASE}"


def test_an_archive_that_has_gone_on_is_told_with_what_to_do(host):
    offer_headers(host, version="6.1.9-2")
    offer_headers(host, version="6.1.9-2", lists="mirror-lists")
    with pytest.raises(HostError, match=r"is of version 6\.1\.9-1, .* is there in 6\.1\.9-2 only") as caught:
        headers.ensure("debian")
    assert "hv kernel get debian --update" in caught.value.hint


def test_an_archive_that_has_them_no_more_is_told_with_what_to_do(host):
    host.package("x", "1", {}, lists="mirror-lists")
    with pytest.raises(HostError, match=f"archive has no linux-headers-{RELEASE}") as caught:
        headers.ensure("debian")
    assert "hv kernel get debian --update" in caught.value.hint


def test_a_package_without_a_makefile_is_told(host):
    host.package(f"linux-headers-{RELEASE}", VERSION, {"usr/share/doc/x": b""})
    with pytest.raises(HostError, match="holds no usr/src"):
        headers.ensure("debian")


def test_the_compiler_that_the_kernel_was_built_with_is_named(host):
    offer_headers(host)
    host.drop("gcc-12")
    with pytest.raises(HostError, match="needs gcc-12, not found") as caught:
        headers.ensure("debian")
    assert caught.value.hint == "apt-get install gcc-12"


@pytest.mark.parametrize("name", ["tiny", "hello-pio"])
def test_kernels_without_headers_say_which_has_them(host, name, monkeypatch):
    real = kernels.kernel("debian")
    monkeypatch.setattr(kernels, "kernel", lambda _name: real._replace(kind="built"))
    with pytest.raises(ConfigError, match=f"{name} has no headers") as caught:
        headers.ensure(name)
    assert "hv kernel headers debian" in caught.value.hint


def test_a_kernel_that_is_not_here_is_told_how_to_get(cache):
    with pytest.raises(ConfigError, match="not in the cache") as caught:
        headers.ensure("debian")
    assert caught.value.hint == "hv kernel get debian"


@pytest.mark.parametrize("folder", ["my cache", "a:b"])
def test_a_path_that_makefiles_do_not_take_is_refused(host, folder, tmp_path, monkeypatch):
    """Documentation/kbuild: make splits paths at blanks and colons."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
    kernels.get("debian")
    offer_headers(host)
    with pytest.raises(ConfigError, match="no path with blanks or colons"):
        headers.ensure("debian")


def test_the_command_prints_the_folder_and_nothing_else(host, capsys):
    offer_headers(host)
    assert cli.main(["kernel", "headers", "debian"]) == 0
    out = capsys.readouterr().out
    assert out == f"{headers.ensure('debian')}\n"
    assert cli.main(["kernel", "headers", "debian", "--check"]) == 0
    assert capsys.readouterr().out == out
