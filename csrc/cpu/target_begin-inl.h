// From here on functions are compiled for XECO_TARGET, whatever the command line says. Ends with cpu/target_end-inl.h.
#define XECO_PRAGMA(text) _Pragma(#text)
#define XECO_EXPAND_PRAGMA(text) XECO_PRAGMA(text)
#if defined(__clang__)
XECO_EXPAND_PRAGMA(clang attribute push(__attribute__((target(XECO_TARGET))), apply_to = function))
#else
#pragma GCC push_options
XECO_EXPAND_PRAGMA(GCC target(XECO_TARGET))
#endif
