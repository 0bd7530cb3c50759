// pybind11, for the two files that make a Python module. Some torch (2.11) bring a copy of it that refuses files held
// to the stable ABI; these two include nothing of torch.
#pragma once

#undef TORCH_TARGET_VERSION

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
