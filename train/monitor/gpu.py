"""Load of a GPU's engines while something runs, by NVML: what no timer in the program can see."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch


class NoNvmlError(RuntimeError):
    """There is no GPU to ask, or no driver that answers; the message says which."""


class GpuReader:
    """Reads one GPU's load.

    Args:
        bus_id: PCI address of the GPU; `bus_id_of` finds it for a torch device.

    Raises:
        NoNvmlError: The package pynvml, the driver or the GPU is not there.
    """

    def __init__(self, bus_id: str) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise NoNvmlError("the package nvidia-ml-py is not installed") from error
        self._nvml: Any = pynvml
        self.error: type[Exception] = pynvml.NVMLError
        """What `read` raises when the driver or the GPU fails."""
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        except pynvml.NVMLError as error:
            raise NoNvmlError(f"NVML does not answer for GPU {bus_id}: {error}") from error
        self.unsupported: set[str] = set()
        """Readings that this GPU or its driver does not have."""

    def read(self) -> dict[str, float]:
        """Percent of the driver's last sampling period (1/6 s to 1 s), MB/s, MHz, W, degrees, GiB.

        Takes about 40 ms, nearly all of it waiting: the driver counts PCIe bytes over 20 ms.
        """
        values: dict[str, float] = {}
        for name, reading in _READINGS.items():
            if name in self.unsupported:
                continue
            try:
                values[name] = float(reading(self._nvml, self._handle))
            except self._nvml.NVMLError_NotSupported:
                self.unsupported.add(name)
        return values


_READINGS: dict[str, Callable[[Any, Any], float]] = {
    "sm_pct": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "memory_pct": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).memory,
    "jpeg_pct": lambda nvml, gpu: nvml.nvmlDeviceGetJpgUtilization(gpu)[0],
    "decoder_pct": lambda nvml, gpu: nvml.nvmlDeviceGetDecoderUtilization(gpu)[0],
    "pcie_rx_mb_per_s": lambda nvml, gpu: (
        nvml.nvmlDeviceGetPcieThroughput(gpu, nvml.NVML_PCIE_UTIL_RX_BYTES) / 1e3
    ),
    "pcie_tx_mb_per_s": lambda nvml, gpu: (
        nvml.nvmlDeviceGetPcieThroughput(gpu, nvml.NVML_PCIE_UTIL_TX_BYTES) / 1e3
    ),
    "sm_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "power_w": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    "temperature_c": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(
        gpu, nvml.NVML_TEMPERATURE_GPU
    ),
    "used_gib": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**30,
}
"""`sm_pct` is the share of time in which any kernel ran, not how full the SMs were; `jpeg_pct` and
`decoder_pct` are the JPEG and video units."""


def bus_id_of(device: torch.device) -> str:
    """PCI address of a CUDA device, whatever CUDA_VISIBLE_DEVICES has renumbered.

    Raises:
        NoNvmlError: The device is no GPU.
    """
    if device.type != "cuda":
        raise NoNvmlError(f"the run is on {device.type}: there is no GPU to ask")
    found: Any = torch.cuda.get_device_properties(device)
    return f"{found.pci_domain_id:08x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


class GpuSampler:
    """Samples a GPU's load in a thread while the block runs.

    Without a GPU or its driver nothing is sampled: `load` is empty and `note` says why.

    Args:
        device: Device of torch.
        every_s: Seconds between two samples; the driver's own period is 1/6 s at best.
    """

    def __init__(self, device: torch.device, *, every_s: float = 0.2) -> None:
        self.note = ""
        self._every_s = every_s
        self._samples: dict[str, list[float]] = defaultdict(list)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cmae-nvml", daemon=True)
        try:
            self._reader: GpuReader | None = GpuReader(bus_id_of(device))
        except NoNvmlError as error:
            self._reader, self.note = None, f"GPU load was not sampled: {error}"

    def __enter__(self) -> Self:
        """Start sampling."""
        if self._reader is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop sampling."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def load(self) -> dict[str, Any]:
        """{'mean': {reading: value}, 'max': {...}, 'samples': n}; empty when nothing was sampled."""
        if not self._samples:
            return {}
        return {
            "mean": {name: sum(values) / len(values) for name, values in self._samples.items()},
            "max": {name: max(values) for name, values in self._samples.items()},
            "samples": max(map(len, self._samples.values())),
        }

    def _run(self) -> None:
        assert self._reader is not None
        while True:
            try:
                values = self._reader.read()
            except Exception as error:
                # A GPU that falls off the bus must not look like an idle one.
                self.note = f"GPU load is incomplete: {error}"
                return
            for name, value in values.items():
                self._samples[name].append(value)
            if self._stop.wait(self._every_s):
                return


def gpu_reader(device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that reads the device's load now; it gives nothing where NVML does not answer."""
    try:
        reader = GpuReader(bus_id_of(device))
    except NoNvmlError:
        return dict

    def read() -> dict[str, float]:
        try:
            return reader.read()
        except reader.error:
            return {}

    return read
