/* The header as a shared library, for the tests to call. */
#define DRIFTPROBE_IMPLEMENTATION
#include "driftprobe.h"

const size_t dp_test_sizes[] = {sizeof(dp_tensor), sizeof(dp_key), sizeof(dp_header), sizeof(dp_fingerprint)};

/* The hash of n bytes, given in pieces of `piece`. */
uint64_t dp_test_hash(const unsigned char *data, size_t n, size_t piece) {
    dp__hasher h;
    uint64_t hash;
    size_t at, part;
    if (!dp__new_hasher(&h)) return 0;
    dp__hash_begin(&h, n);
    for (at = 0; at < n; at += part) {
        part = n - at < piece ? n - at : piece;
        dp__hash_add(&h, data + at, part);
    }
    hash = dp__hash_end(&h);
    if (h.state) XXH3_freeState(h.state);
    return hash;
}

/* Have this thread take subnormals for 0 from now on, or not. Returns whether that can be told. */
int dp_test_flush_subnormals(int on) {
#if DP__X86
    _mm_setcsr(on ? _mm_getcsr() | 0x8040 : _mm_getcsr() & ~0x8040u);
    return 1;
#else
    (void)on;
    return 0;
#endif
}
