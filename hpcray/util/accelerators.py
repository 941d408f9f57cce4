"""Names of accelerators, for the option `accelerator_type`.

A node offers `accelerator_type:X` if its GPUs are of that model, or if it was given the resource:
`init(resources={"accelerator_type:X": 1})`.
"""

from __future__ import annotations

NVIDIA_TESLA_K80 = "K80"
NVIDIA_TESLA_P4 = "P4"
NVIDIA_TESLA_P100 = "P100"
NVIDIA_TESLA_V100 = "V100"
NVIDIA_TESLA_T4 = "T4"
NVIDIA_TESLA_A10G = "A10G"
NVIDIA_L4 = "L4"
NVIDIA_L40S = "L40S"
NVIDIA_A100 = "A100"
# No node finds out by itself which A100 it has: give it the resource.
NVIDIA_A100_40G = "A100-40G"
NVIDIA_A100_80G = "A100-80G"
NVIDIA_H100 = "H100"
NVIDIA_H200 = "H200"
NVIDIA_H20 = "H20"
NVIDIA_B200 = "B200"
NVIDIA_B300 = "B300"
NVIDIA_GB200 = "GB200"
NVIDIA_GB300 = "GB300"
NVIDIA_RTX_PRO_6000 = "RTX-PRO-6000"
AMD_INSTINCT_MI100 = "AMD-Instinct-MI100"
AMD_INSTINCT_MI210 = "AMD-Instinct-MI210"
AMD_INSTINCT_MI250 = "AMD-Instinct-MI250X-MI250"
AMD_INSTINCT_MI250x = "AMD-Instinct-MI250X"
AMD_INSTINCT_MI300A = "AMD-Instinct-MI300A"
AMD_INSTINCT_MI300x = "AMD-Instinct-MI300X-OAM"
INTEL_MAX_1100 = "Intel-GPU-Max-1100"
INTEL_MAX_1550 = "Intel-GPU-Max-1550"
INTEL_GAUDI = "Intel-GAUDI"
