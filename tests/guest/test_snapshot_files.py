"""A guest that is stopped, saved to files, and goes on in a machine that has only them."""

import os

import pytest
from carried import MSRS, TIMEOUT, machine_of, stop_at_random, take
from snapshots import save

from hypervisor import cli
from hypervisor.kvm.state import from_plain, load
from hypervisor.snapshot import fit
from hypervisor.snapshot.store import Snapshot

pytestmark = pytest.mark.kvm


@pytest.fixture
def taken():
    """A guest's state and memory, with its description and what it has said; stopped on its way."""
    import random  # noqa: PLC0415 - the fixture's own

    chance = random.Random(5)
    for _ in range(50):
        with machine_of({"kernel": "checksum"}) as machine:
            machine.start()
            if stop_at_random(machine, chance, 0.02):
                kvm, memory = take(machine)
                yield kvm, memory, machine.config.to_plain(), machine.console.output
                machine.resume()
                return
    pytest.fail("the guest was never stopped on its way")


@pytest.mark.parametrize("compress", [False, True])
def test_a_guest_goes_on_from_files(tmp_path, taken, compress):
    kvm, memory, config, before = taken
    with machine_of({"kernel": "checksum"}) as machine:
        status = machine.run(TIMEOUT).status
        expected = machine.console.output
    host = fit.facts(fit.this_host(), {"kvm": kvm})
    save(tmp_path / "s", memory, state={"kvm": kvm}, config=config, host=host, compress=compress)
    with Snapshot.open(tmp_path / "s") as snapshot:
        snapshot.verify()
        assert snapshot.state["kvm"] == kvm
        assert snapshot.host["vendor"]
        fd, _, size = snapshot.map_memory()
        with machine_of({"kernel": "checksum"}) as machine:
            machine.memory.write(0, os.pread(fd, size, 0))
            load(machine._vm, from_plain(snapshot.state["kvm"]))
            machine.start()
            assert machine.wait(TIMEOUT).status == status
            assert before + machine.console.output == expected
        os.close(fd)


def test_what_was_saved_here_runs_here(tmp_path, taken, capsys):
    kvm, memory, config, _ = taken
    save(tmp_path / "s", memory, state={"kvm": kvm}, config=config)
    assert cli.main(["snapshot", "check", str(tmp_path / "s")]) == 0
    assert "runs on this host" in capsys.readouterr().out
    kvm["vcpus"][0]["msrs"].append([0x7FFF_0000, 5])  # of nobody
    save(tmp_path / "s", memory, state={"kvm": kvm}, config=config)
    assert 0x7FFF_0000 not in MSRS
    assert cli.main(["snapshot", "check", str(tmp_path / "s")]) == 1
    assert capsys.readouterr().out == "msr: this host's KVM does not keep the MSRs 0x7fff0000\n"
