from __future__ import annotations

from pathlib import Path

import pytest

from cmae.train.commands import doctor
from cmae.train.commands.doctor import Check
from cmae.train.commands.main import main

GIB = 2**30


def test_the_doctor_finds_this_environment_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.doctor() == 0
    printed = capsys.readouterr().out
    for name in ("python", "torch", "CUDA", "DALI", "webdataset", "open files", "ready"):
        assert name in printed


def test_a_quick_look_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a container's health check calls every few minutes."""
    for name in ("check_dali", "check_gpu_decode", "check_nvjpeg"):
        monkeypatch.setattr(doctor, name, lambda: pytest.fail("slow"))
    names = [check.name for check in doctor.collect_checks(doctor.QUICK)]
    assert {"python", "torch", "CUDA", "memory", "/dev/shm", "disk"} <= set(names)
    assert main(["doctor", "--quick"]) == 0


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """As in a container with a read-only root and no volume for it."""
    assert doctor.check_caches({"TRITON_CACHE_DIR": str(tmp_path / "not" / "yet")}).status == "ok"
    found = doctor.check_caches({"TORCHINDUCTOR_CACHE_DIR": "/proc/inductor"})
    assert found.status == "fail"
    assert "TORCHINDUCTOR_CACHE_DIR=/proc/inductor" in found.found
    assert "mount a volume" in found.fix


def test_the_exit_code_is_1_only_for_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Check("a", "x", "ok"), Check("b", "[y]", "warn", "do this")]
    monkeypatch.setattr(doctor, "collect_checks", lambda names: rows)
    assert doctor.doctor() == 0
    rows.append(Check("c", "z", "fail", "do that"))
    assert doctor.doctor() == 1
    printed = capsys.readouterr().out
    assert "not ready: fix c" in printed
    assert "[y]" in printed


def test_a_check_that_breaks_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Check:
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "check_memory", broken)
    rows = {check.name: check for check in doctor.collect_checks()}
    assert rows["memory"].status == "fail"
    assert "no such device" in rows["memory"].found
    assert rows["disk"].status == "ok" or rows["disk"].fix


def test_python_below_3_11_fails() -> None:
    assert doctor.check_python((3, 10, 9)).status == "fail"
    assert doctor.check_python((3, 11, 0)).status == "ok"


def test_a_missing_package_fails_only_if_it_is_needed() -> None:
    missing = doctor.check_package("no_such_package_here")
    assert (missing.status, missing.fix) == ("fail", "pip install no_such_package_here")
    assert doctor.check_package("no_such_package_here", needed=False).status == "warn"


def test_a_package_whose_import_breaks_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_one.py").write_text("raise ImportError('libfoo.so: not found')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "1.0")
    check = doctor.check_package("broken_one")
    assert check.status == "fail"
    assert "libfoo.so" in check.found


def explain(
    *,
    available: bool = False,
    build: str | None = "13.0",
    driver: str | None = "580.65",
    visible: str | None = None,
    warning: str = "",
) -> Check:
    return doctor.explain_cuda(
        available=available, build=build, driver=driver, visible=visible, warning=warning
    )


def test_cuda_says_why_it_is_not_there() -> None:
    assert explain(available=True).status == "ok"
    assert "CPU build" in explain(build=None).found
    assert explain(driver=None).found == "no NVIDIA driver"
    old = explain(driver="535.104.05")
    assert "too old for CUDA 13.0" in old.found
    assert "580" in old.fix
    assert "too old" not in explain(build="12.8", driver="535.104.05").found
    for hidden in ("", "-1"):
        assert "hidden by CUDA_VISIBLE_DEVICES" in explain(visible=hidden).found
    assert "hidden" not in explain(visible="1").found
    assert explain(warning="CUDA initialization: broken").found == "CUDA initialization: broken"
    assert {explain(build=None).status, explain(driver=None).status, old.status} == {"warn"}


def test_gpu_rows_warn_of_old_or_busy_devices() -> None:
    free = doctor.describe_gpu(0, "H100", capability=(9, 0), free=78 * GIB, total=80 * GIB)
    assert free == Check("GPU 0", "H100, compute 9.0, 78 of 80 GiB free", "ok", "")
    busy = doctor.describe_gpu(1, "H100", capability=(9, 0), free=10 * GIB, total=80 * GIB)
    assert "another process" in busy.fix
    old = doctor.describe_gpu(0, "V100", capability=(7, 0), free=32 * GIB, total=32 * GIB)
    assert old.status == "warn"


def test_the_wrong_apex_is_told_from_nvidias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.check_apex().found == "absent (only optim.impl=apex needs it)"
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    wrong = doctor.check_apex()
    assert wrong.status == "warn"
    assert wrong.fix.startswith("pip uninstall apex")
    (package / "optimizers").mkdir()
    unbuilt = doctor.check_apex()
    assert unbuilt.found == "NVIDIA's, without fused kernels"
    assert "build it from source" in unbuilt.fix
    (tmp_path / "amp_C.py").touch()
    assert doctor.check_apex().found == "NVIDIA's, with fused kernels"


def test_container_quotas_are_read_from_both_cgroup_versions(tmp_path: Path) -> None:
    assert doctor.cgroup_limit(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("250000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert doctor.cgroup_limit(tmp_path) == 2.5
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert doctor.cgroup_limit(tmp_path) is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor.cgroup_limit(tmp_path) is None
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert doctor.cgroup_limit(tmp_path) == 4.0


def test_cpu_rows_count_what_may_be_used() -> None:
    assert doctor.describe_cpu(cores=8, allowed=8, quota=None, num_gpus=0).status == "ok"
    few = doctor.describe_cpu(cores=64, allowed=64, quota=4.0, num_gpus=0)
    assert (few.found, few.status) == ("4 usable of 64", "warn")
    starved = doctor.describe_cpu(cores=16, allowed=16, quota=None, num_gpus=4)
    assert "8 to 16 cores a GPU" in starved.fix


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (doctor.check_memory(1 * GIB), doctor.check_memory(64 * GIB)),
        (
            doctor.check_shared_memory("/", size=64 * 2**20),
            doctor.check_shared_memory("/", size=8 * GIB),
        ),
        (doctor.check_open_files(1024), doctor.check_open_files(65536)),
        (doctor.check_disk(free=1 * GIB), doctor.check_disk(free=100 * GIB)),
        (
            doctor.check_omp_threads({"OMP_NUM_THREADS": "9999"}),
            doctor.check_omp_threads({"OMP_NUM_THREADS": "1"}),
        ),
    ],
)
def test_scarce_resources_warn_and_say_what_to_do(low: Check, high: Check) -> None:
    assert low.status == "warn"
    assert low.fix
    assert (high.status, high.fix) == ("ok", "")


def test_dali_decodes_an_image_here() -> None:
    assert doctor.check_dali().status == "ok"
