"""House rules that import-linter cannot see."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_only_the_kvm_package_touches_the_compiled_module():
    users = [
        path.relative_to(ROOT).as_posix()
        for folder in ("hypervisor", "devices")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^\s*(from|import) .*\b(_kvm|cffi)\b", path.read_text(), re.MULTILINE)
    ]
    assert users
    assert all(user.startswith("hypervisor/kvm/") for user in users)
