"""GPU load by NVML, with a driver made of Python."""

# ruff: noqa: N801, N802, N818  the names are the driver's

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cmae.train.monitor import gpu as nvml
from cmae.train.monitor.gpu import GpuReader, GpuSampler, NoNvmlError, bus_id_of, gpu_reader

CUDA = torch.device("cuda", 0)
BUS_ID = "00000000:3b:00.0"


class FakeDriver(ModuleType):
    """A GPU whose JPEG unit cannot be asked and whose SM load alternates between 20 and 80 %."""

    NVML_PCIE_UTIL_RX_BYTES, NVML_PCIE_UTIL_TX_BYTES = 1, 0
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.reads = 0
        self.is_lost = False

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:
        if bus_id != BUS_ID:
            raise self.NVMLError("Not Found")
        return "gpu"

    def nvmlDeviceGetUtilizationRates(self, gpu: str) -> Any:
        if self.is_lost:
            raise self.NVMLError("GPU is lost")
        self.reads += 1
        return SimpleNamespace(gpu=20 if self.reads % 4 < 2 else 80, memory=10)

    def nvmlDeviceGetJpgUtilization(self, gpu: str) -> list[int]:
        raise self.NVMLError_NotSupported("Not Supported")

    def nvmlDeviceGetDecoderUtilization(self, gpu: str) -> list[int]:
        return [30, 167_000]

    def nvmlDeviceGetPcieThroughput(self, gpu: str, counter: int) -> int:
        return 2_500_000 if counter == self.NVML_PCIE_UTIL_RX_BYTES else 1_000

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> int:
        return 1410

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return 300_000

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: int) -> int:
        return 60

    def nvmlDeviceGetMemoryInfo(self, gpu: str) -> Any:
        return SimpleNamespace(used=2**31)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(nvml, "bus_id_of", lambda device: BUS_ID)
    return fake


def test_a_reading_is_in_the_units_of_its_name(driver: FakeDriver) -> None:
    values = GpuReader(BUS_ID).read()
    assert values["decoder_pct"] == 30
    assert values["pcie_rx_mb_per_s"] == 2500
    assert values["pcie_tx_mb_per_s"] == 1
    assert values["power_w"] == 300
    assert values["used_gib"] == 2


def test_what_the_gpu_cannot_tell_is_left_out_and_named(driver: FakeDriver) -> None:
    reader = GpuReader(BUS_ID)
    assert "jpeg_pct" not in reader.read()
    assert reader.unsupported == {"jpeg_pct"}


def test_a_sampler_gives_mean_and_maximum(driver: FakeDriver) -> None:
    with GpuSampler(CUDA, every_s=0.002) as sampler:
        while driver.reads < 20:
            time.sleep(0.005)
    load = sampler.load
    assert load["samples"] >= 10
    assert 20 < load["mean"]["sm_pct"] < 80
    assert load["max"]["sm_pct"] == 80
    assert load["mean"]["sm_clock_mhz"] == 1410
    assert sampler.note == ""


def test_a_gpu_that_is_lost_is_said_so(driver: FakeDriver) -> None:
    driver.is_lost = True
    with GpuSampler(CUDA) as sampler:
        pass
    assert sampler.load == {}
    assert sampler.note == "GPU load is incomplete: GPU is lost"
    assert gpu_reader(CUDA)() == {}


def test_without_a_gpu_it_says_why() -> None:
    with GpuSampler(torch.device("cpu")) as sampler:
        pass
    assert sampler.load == {}
    assert sampler.note == "GPU load was not sampled: the run is on cpu: there is no GPU to ask"
    assert gpu_reader(torch.device("cpu"))() == {}


def test_without_a_driver_it_says_why(driver: FakeDriver) -> None:
    with pytest.raises(
        NoNvmlError, match=r"NVML does not answer for GPU 00000000:ff:00\.0: Not Found"
    ):
        GpuReader("00000000:ff:00.0")


def test_without_the_package_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoNvmlError, match="nvidia-ml-py is not installed"):
        GpuReader(BUS_ID)


def test_the_address_is_the_one_that_nvml_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert bus_id_of(CUDA) == BUS_ID


@pytest.mark.gpu
def test_a_real_gpu_answers() -> None:
    values = GpuReader(bus_id_of(CUDA)).read()
    assert 0 <= values["sm_pct"] <= 100
    assert values["used_gib"] > 0
