// The standard headers that the kernels use, included before any target is set: their inline functions must not be
// compiled for an instruction set that other callers' machines lack.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
