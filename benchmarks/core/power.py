"""The SM clock and the power of the card, and what a call takes under sustained load.

Under load the clock falls within milliseconds, until the card draws no more than its limit. NVML's
figures follow some tens of milliseconds later, so the clock is measured on the device as well.
"""

import dataclasses
import math
import statistics
import threading

from core.timing import Round, burst

SAMPLE_SECONDS = 0.002
PROBE_NANOSECONDS = 50_000
PROBES = 5
# The part of the sustained time that warming up and probing the clock last.
PROBED_PART = 0.3

PROBE_KERNEL = r"""
__device__ unsigned long long now() {
  unsigned long long t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}
// One thread: clocks and nanoseconds between two ticks of the timer, which may be coarse.
extern "C" __global__ void clock_probe(unsigned long long nanoseconds, unsigned long long* out) {
  const unsigned long long before = now();
  unsigned long long start, end;
  while ((start = now()) == before) {
  }
  const long long first = clock64();
  do {
    end = now();
  } while (end - start < nanoseconds);
  out[0] = clock64() - first;
  out[1] = end - start;
}
"""


@dataclasses.dataclass(frozen=True)
class Sustained:
    us: float  # a call
    mhz: int | None  # the SM clock
    watts: int | None


class Nvml:
    """Readings of the first device. The constructor raises if NVML is not there."""

    def __init__(self):
        import pynvml

        pynvml.nvmlInit()
        self._nvml, self._device = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        self.mhz()
        self.watts()

    def mhz(self):
        return self._nvml.nvmlDeviceGetClockInfo(self._device, self._nvml.NVML_CLOCK_SM)

    def watts(self):
        """The power at this moment if the driver tells it, else the mean of the last second."""
        try:
            field = self._nvml.NVML_FI_DEV_POWER_INSTANT
            (value,) = self._nvml.nvmlDeviceGetFieldValues(self._device, [field])
            if value.nvmlReturn == 0 and value.value.uiVal > 0:
                return value.value.uiVal / 1e3
        except Exception:
            pass  # an old driver, or old bindings
        return self._nvml.nvmlDeviceGetPowerUsage(self._device) / 1e3


class ClockProbe:
    """Measures the SM clock on the device. The constructor raises if CuPy is not there."""

    def __init__(self):
        import cupy

        self._cupy = cupy
        self._kernel = cupy.RawKernel(PROBE_KERNEL, "clock_probe")
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._out = cupy.empty(2, cupy.uint64)
        self.mhz()

    def mhz(self):
        """Runs beside whatever the device does, and returns when it has run."""
        with self._stream:
            self._kernel((1,), (1,), (self._cupy.uint64(PROBE_NANOSECONDS), self._out))
            found = self._out.get(self._stream)
            self._stream.synchronize()
        clocks, nanoseconds = found.tolist()
        return 1e3 * clocks / nanoseconds


def attempt(make, what):
    """What `make` returns. If it raises: None, and a printed line that says why."""
    try:
        return make()
    except Exception as error:
        print(f"no {what}: {type(error).__name__}: {error}", flush=True)
        return None


class Meter:
    """The readings that this machine has: `nvml` and `probe`, each None where it is missing."""

    def __init__(self, found=True):
        self.nvml = attempt(Nvml, "NVML") if found else None
        self.probe = attempt(ClockProbe, "clock probe") if found else None

    def sm_clock(self):
        return self.nvml and self.nvml.mhz()


class Sampler:
    """Reads NVML in a thread, as a context manager. It stops at the first reading that fails."""

    def __init__(self, nvml):
        self._nvml, self._stop = nvml, threading.Event()
        self.samples = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        while not self._stop.wait(SAMPLE_SECONDS):
            try:
                self.samples.append((self._nvml.mhz(), self._nvml.watts()))
            except Exception:
                return

    def __enter__(self):
        if self._nvml is not None:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        if self._nvml is not None:
            self._thread.join()

    def medians(self):
        """(MHz, watts) of the later half, when the clock no longer falls; None if unknown."""
        later = self.samples[len(self.samples) // 2 :]
        if not later:
            return None, None
        return tuple(round(statistics.median(values)) for values in zip(*later, strict=True))


def _probed(probe):
    return attempt(lambda: round(statistics.median(probe.mhz() for _ in range(PROBES))), "clock")


def sustain(round_: Round, us, seconds, meter):
    """Times calls of about `us` under a load of `seconds`, and reads clock and power.

    The first burst warms the card up and the second is timed. The third follows at once and is not
    timed: there the probes of the clock use a part of an SM.
    """
    rounds = max(1, math.ceil(1e6 * seconds / (us * round_.calls)))
    few = max(1, round(PROBED_PART * rounds))
    with Sampler(meter.nvml) as sampler:
        burst(round_, few)
        elapsed, _ = burst(round_, rounds)
    mhz, watts = sampler.medians()
    if meter.probe is not None:
        _, probed = burst(round_, few, lambda: _probed(meter.probe))
        mhz = probed or mhz
    return Sustained(1e6 * elapsed / (rounds * round_.calls), mhz, watts)
