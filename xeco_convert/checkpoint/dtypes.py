"""The dtypes of stored tensors: safetensors' names, their sizes, torch's dtypes, and the words that config.json uses."""

from __future__ import annotations

import torch

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Bytes of one number, also of what is only ever refused by name.
DTYPE_BYTES = {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} | {
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
}
# The dtypes that weights may have, under the names that config.json and --dtype give them.
STORED_AS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
CONFIG_NAMES = {stored: name for name, stored in STORED_AS.items()}
