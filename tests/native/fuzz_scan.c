/* Damaged and random lines through the scanner of records; run under sanitizers by the tests.
 * Usage: fuzz_scan FILE SEED ROUNDS. Each round changes a few bytes of the file's lines, puts the result, without a byte
 * to spare, on the heap, and scans it into arrays of random sizes. Ends with 1 where the scanner breaks its word. */
#include <stdio.h>

#include "_records.h"

static uint64_t state;

static uint64_t draw(uint64_t below) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % below;
}

static const char ODD[] = "\"\\{}[],:.0123456789eE+-xn \t\n\r";

/* Change, drop, double or cut some bytes in place; returns the new length, at most the old. */
static int64_t spoil(char *data, int64_t length) {
    uint64_t times = draw(6);
    while (times-- && length > 2) {
        int64_t at = (int64_t)draw((uint64_t)length), size = 1 + (int64_t)draw(12);
        if (at + size > length) size = length - at;
        switch (draw(5)) {
        case 0: data[at] = (char)draw(256); break;
        case 1: data[at] = ODD[draw(sizeof ODD - 1)]; break;
        case 2: memmove(data + at, data + at + size, (size_t)(length - at - size)), length -= size; break;
        case 3: memmove(data + at, data + (int64_t)draw((uint64_t)(length - size + 1)), (size_t)size); break;
        default: length = at; break;
        }
    }
    return length;
}

/* Scan all of the data, with room that may run out and is then given anew; 0 where rows and lines do not agree. */
static int scan_all(const char *data, int64_t length, words *known) {
    int64_t at = 0, lines = 0, seen = 0, i;
    for (i = 0; i < length; i++) lines += data[i] == '\n';
    while (at < length) {
        int64_t rows = 0, used, size = 1 + (int64_t)draw(5);
        sink out;
        memset(&out, 0, sizeof out);
        out.known = known, out.sketch_size = size;
        out.room_rows = 1 + (int64_t)draw(4), out.room_sums = size + (int64_t)draw(64), out.room_hashes = (int64_t)draw(40);
        out.rows = (row *)malloc((size_t)out.room_rows * sizeof *out.rows);
        out.sums = (double *)malloc((size_t)out.room_sums * sizeof *out.sums);
        out.hashes = (uint64_t *)malloc((size_t)out.room_hashes * sizeof *out.hashes + 1);
        used = scan_lines(data + at, length - at, at, &out, &rows);
        for (i = 0; i < rows; i++) {
            const row *r = out.rows + i;
            if (r->at < 0 || r->length < 1 || r->at + r->length > length || data[r->at + r->length - 1] != '\n') return 0;
            if (r->taken && (r->tensor < 0 || r->tensor >= known->count || r->layer < -1)) return 0;
        }
        seen += rows;
        free(out.rows), free(out.sums), free(out.hashes);
        if (used < 0 || used > length - at) return 0;
        if (!used) break; /* no whole line is left, or one that needs more room than there ever is here */
        at += used;
    }
    return seen <= lines;
}

int main(int argc, char **argv) {
    static char whole[1 << 16];
    FILE *file = argc > 3 ? fopen(argv[1], "rb") : NULL;
    int64_t size, round, rounds = argc > 3 ? atol(argv[3]) : 0;
    if (!file) return 2;
    size = (int64_t)fread(whole, 1, sizeof whole, file);
    fclose(file);
    state = (uint64_t)atoll(argv[2]) * 2654435761u + 88172645463325252u;
    for (round = 0; round < rounds; round++) {
        words *known = (words *)calloc(1, sizeof *known);
        int64_t start = (int64_t)draw((uint64_t)size), length = 1 + (int64_t)draw((uint64_t)(size - start)), i;
        char *copy = (char *)malloc((size_t)length), *tight;
        int good;
        memcpy(copy, whole + start, (size_t)length);
        length = spoil(copy, length);
        tight = (char *)malloc((size_t)(length ? length : 1));
        memcpy(tight, copy, (size_t)length);
        good = scan_all(tight, length, known);
        for (i = 0; i < known->count; i++) free(known->text[i]);
        free(known), free(copy), free(tight);
        if (!good) return fprintf(stderr, "round %ld\n", (long)round), 1;
    }
    return 0;
}
