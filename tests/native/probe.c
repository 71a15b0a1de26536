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

/* The hashes of a tensor's rows, made in the pass over all of it. Returns how many were written. */
size_t dp_test_rows(const dp_tensor *t, uint64_t *hashes) {
    double sketch[DP_SKETCH_SIZE];
    dp_fingerprint print;
    dp__rows rows;
    dp__room *room = dp__new_room(dp__elements(t), DP_SKETCH_SIZE);
    if (!room) return 0;
    memset(&rows, 0, sizeof rows);
    rows.hashes = hashes, rows.hasher = &room->row, room->row.seen = 0;
    rows.bytes = (size_t)(dp__elements(t) / t->shape[0]) * dp__dtypes[t->dtype].size;
    dp__measure(t, DP_SKETCH_SIZE, &print, sketch, &rows, room);
    dp__free_room(room);
    return (size_t)(rows.hashes - hashes);
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
