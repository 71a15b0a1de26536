/* Random calls of every function of driftprobe.h, right and wrong ones; run under sanitizers by the tests.
 * Usage: fuzz FOLDER SEED ROUNDS. Ends with 0, or with 1 where a status is not what the arguments ask for. */
#define DRIFTPROBE_IMPLEMENTATION
#include "driftprobe.h"

static uint64_t state;

static uint64_t draw(uint64_t below) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % below;
}

static unsigned char bytes[1 << 16];

/* A tensor whose every element lies inside `bytes`, with strides of all kinds; now and then one that must be refused. */
static dp_tensor any_tensor(int *bad) {
    int64_t shape[DP_MAX_DIMS], low = 0, high = 0;
    int d, ndim = (int)draw(5);
    dp_tensor t;
    for (d = 0; d < ndim; d++) shape[d] = (int64_t)draw(9);
    t = dp_make_tensor(bytes, (dp_dtype)draw(12), ndim, shape);
    for (d = 0; d < ndim; d++) {
        if (draw(3) == 0) t.strides[d] = (int64_t)draw(41) - 20;
        if (t.shape[d] > 0) {
            int64_t reach = t.strides[d] * (t.shape[d] - 1);
            if (reach < 0) low += reach;
            else high += reach;
        }
    }
    (void)high; /* at most 8^4 elements of 8 bytes, or 4 axes of 7 x 20: both inside */
    t.data = bytes + (size_t)(-low) * 8;
    *bad = draw(12) == 0;
    if (*bad) {
        int which = (int)draw(4);
        if (which == 0) t.ndim = 9 + (int)draw(100);
        if (which == 1) t.dtype = 12 + (int)draw(100);
        if (which == 2) t.ndim = 1, t.shape[0] = -1 - (int64_t)draw(1000);
        if (which == 3) t.ndim = 1, t.shape[0] = 3, t.data = NULL;
    }
    return t;
}

static const char *any_text(char *room) {
    size_t n = (size_t)draw(12), i;
    for (i = 0; i < n; i++) room[i] = (char)(draw(4) ? 32 + draw(95) : 1 + draw(255));
    room[n] = 0;
    return room;
}

int main(int argc, char **argv) {
    static double sums[65536];
    char path[512], names[8][16];
    long round, rounds = argc > 3 ? atol(argv[3]) : 0;
    size_t i;
    memset(names, 0, sizeof names);
    if (argc < 4) return 2;
    state = (uint64_t)atoll(argv[2]) * 2654435761u + 88172645463325252u;
    for (i = 0; i < sizeof bytes; i++) bytes[i] = (unsigned char)draw(256);
    for (round = 0; round < rounds; round++) {
        dp_header h = dp_default_header(draw(5) ? "prompt" : any_text(names[0]), draw(5) ? "as_designed" : any_text(names[1]));
        dp_trace *trace;
        int64_t layers[3] = {0, 1, 2};
        dp_tap tap = {"q_proj", layers, 3};
        dp_read read = {"P", "prefill_last", 0, 4};
        dp_pair cast = {any_text(names[2]), "float16"};
        long call, calls = (long)draw(40);
        h.prompt_text = any_text(names[3]), h.engine = any_text(names[4]);
        h.token_ids = layers, h.token_count = 3, h.taps = &tap, h.tap_count = 1, h.reads = &read, h.read_count = 1;
        h.casts = &cast, h.cast_count = draw(2), h.payloads = (int)draw(2), h.sketch_size = draw(9) ? 64 : (int64_t)draw(70000);
        snprintf(path, sizeof path, "%s/t%ld.jsonl", argv[1], round);
        if (dp_open(&trace, path, &h) != DP_OK) {
            if (trace || !*dp_message(NULL)) return 1;
            continue;
        }
        for (call = 0; call < calls; call++) {
            int bad;
            dp_tensor t = any_tensor(&bad);
            dp_key key = dp_make_key(draw(9) ? "P" : any_text(names[5]), draw(3) ? "prefill_last" : any_text(names[6]), 0,
                                     draw(9) ? (int64_t)draw(4) : DP_NONE, draw(9) ? "k_cache" : any_text(names[7]));
            dp_count count = {any_text(names[2]), (int64_t)draw(100)};
            dp_fingerprint print;
            dp_status status;
            key.position = (int64_t)draw(50) - 1;
            if (draw(6) == 0) key.tensor = "logits", key.layer = DP_NONE;
            status = dp_write(trace, &key, &t);
            if (bad && status != DP_BAD_ARGUMENT) return 1;
            if (status != DP_OK && !*dp_message(trace)) return 1;
            if (dp_fingerprint_of(&t, 1 + (size_t)draw(65536), &print, sums) != (bad ? DP_BAD_ARGUMENT : DP_OK)) return 1;
            if (draw(4) == 0) dp_constant(trace, (int64_t)draw(3), draw(2) ? "q_proj.weight" : names[7], &t);
            if (draw(4) == 0) dp_event(trace, any_text(names[6]), "A", (int64_t)draw(3), &count, (size_t)draw(2));
            if (draw(9) == 0 && dp_flush(trace) != DP_OK) return 1;
        }
        if (dp_close(trace) != DP_OK) return 1;
    }
    return 0;
}
