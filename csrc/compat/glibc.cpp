// Keeps a wheel that is built on a newer Linux at manylinux_2_28. libstdc++'s shared_ptr skips atomic counting while
// glibc's __libc_single_threaded says that there is one thread; that symbol is glibc 2.32's, and with it alone the
// module would not load on an older one. This hidden definition takes its place inside the module: false, so counts are
// always atomic, which is correct everywhere and not measurable (no shared_ptr is copied in a kernel). Where libstdc++
// is older than that, nothing refers to it.
#include <features.h>

#if defined(__GLIBC__)
extern "C" {
extern __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
}
#endif
