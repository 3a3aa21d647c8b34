"""OpenVINO builders for what stands beside the processor: an Intel GPU or NPU, by OpenVINO's own name of it.

Nothing here has been run on such a device yet. What is sure is what OpenVINO is asked for, that a device which is not
there is refused, and that formats are read back from the compiled model as on the processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lehr.engines import openvino_cpu
from lehr.engines.job import Job
from lehr.runtime.engine import Plan
from lehr.runtime.recipe import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenVinoDevice:
    """A builder for this machine, :class:`lehr.engines.builders.Builder`.

    Attributes:
        device: OpenVINO's name.
        precisions: format -> what OpenVINO calls it, for formats that the device computes in.
    """

    device: str
    precisions: Mapping[Format, str]
    LOWERED: frozenset[Format] = frozenset()
    REFUSES: Mapping[Format, str] = field(default_factory=dict)
    HEEDS: frozenset[str] = frozenset({"mode"})
    CACHED: bool = True

    @property
    def FORMATS(self) -> frozenset[Format]:  # noqa: N802 - the protocol's name
        return frozenset(self.precisions)

    def version(self) -> str:
        """The installed library's version; raises MissingExtra."""
        return openvino_cpu.version()

    def build(self, job: Job, folder: Path) -> Plan:
        """Compile a graph for the device; raises IncompatibleEngine, too, where OpenVINO does not find it.

        A graph that runs once computes in fp32 whatever the recipe: on the processor, where the device has no fp32.
        """
        from lehr.runtime.backends.openvino import DEVICE, check_device

        check_device(self.device)
        own = job.recipe.arithmetic in self.precisions or job.recipe.arithmetic not in openvino_cpu.PRECISIONS
        return openvino_cpu.build_for_device(
            job,
            folder,
            device=self.device if own else DEVICE,
            precisions=self.precisions if own else openvino_cpu.PRECISIONS,
        )


GPU = OpenVinoDevice(device="GPU", precisions={Format.FP32: "f32", Format.FP16: "f16"})
NPU = OpenVinoDevice(device="NPU", precisions={Format.FP16: "f16"})
