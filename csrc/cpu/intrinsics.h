// The processor's own instructions.
#pragma once

// GCC 12's AVX-512 functions read registers that they leave undefined on purpose, and its warnings find them where they
// are used.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
