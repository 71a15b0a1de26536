/* The shortest decimal that reads back as a double, in the words that this project's JSON writer (msgspec) uses.
 *
 * After R. Giulietti, "The Schubfach way to render doubles" (2020): v = c·2^q is scaled by a power of ten to an integer
 * with two more bits, so that at most one multiple of ten, or of one, lies inside the interval that rounds to v. The
 * powers are not a table of constants: they are worked out once, by exact long arithmetic.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef DRIFTPROBE_SHORTEST_H
#define DRIFTPROBE_SHORTEST_H
#include <stdint.h>
#include <string.h>

#define SHORTEST_ROOM 32 /* bytes that a double's text needs at most */
#define SHORTEST_LOW (-292)
#define SHORTEST_HIGH 324
#define SHORTEST_WORDS 24 /* of 64 bits: 10^324, and 2^1280 */

typedef unsigned __int128 shortest_wide;
static uint64_t shortest_powers[SHORTEST_HIGH - SHORTEST_LOW + 1][2];

/* Put the 128 leading bits of a long number into a power of ten, one more where that leaves something out. */
static void shortest_keep(const uint64_t *words, int exponent, int inexact) {
    int top = SHORTEST_WORDS - 1, shift, at;
    uint64_t part[3] = {0, 0, 0};
    shortest_wide value;
    while (!words[top]) top--;
    for (at = 0; at < 3; at++)
        if (top - at >= 0) part[at] = words[top - at];
    for (at = top - 3; at >= 0; at--) inexact |= words[at] != 0;
    shift = __builtin_clzll(part[0]);
    value = (shortest_wide)part[0] << 64 | part[1];
    if (shift) {
        value = value << shift | part[2] >> (64 - shift);
        inexact |= (part[2] << shift) != 0;
    } else inexact |= part[2] != 0;
    value += (shortest_wide)inexact;
    shortest_powers[exponent - SHORTEST_LOW][0] = (uint64_t)(value >> 64);
    shortest_powers[exponent - SHORTEST_LOW][1] = (uint64_t)value;
}

/* Work out the powers; to be called once, before anything is written. */
static void shortest_begin(void) {
    uint64_t words[SHORTEST_WORDS];
    int exponent, at, inexact = 0;
    shortest_wide carry;
    memset(words, 0, sizeof words);
    words[0] = 1;
    for (exponent = 0; exponent <= SHORTEST_HIGH; exponent++) {
        shortest_keep(words, exponent, 0);
        for (carry = 0, at = 0; at < SHORTEST_WORDS; at++) {
            carry += (shortest_wide)words[at] * 10u;
            words[at] = (uint64_t)carry, carry >>= 64;
        }
    }
    memset(words, 0, sizeof words);
    words[20] = 1; /* 2^1280: 10^-292 has 300 bits of it left */
    for (exponent = -1; exponent >= SHORTEST_LOW; exponent--) {
        for (carry = 0, at = SHORTEST_WORDS - 1; at >= 0; at--) {
            carry = carry << 64 | words[at];
            words[at] = (uint64_t)(carry / 10u), carry %= 10u;
        }
        inexact |= carry != 0;
        shortest_keep(words, exponent, inexact);
    }
}

/* power · n without its lowest 128 bits, made odd where those are not nothing. */
static uint64_t shortest_product(const uint64_t *power, uint64_t n) {
    shortest_wide low = (shortest_wide)power[1] * n, high = (shortest_wide)power[0] * n;
    high += (uint64_t)(low >> 64);
    return (uint64_t)(high >> 64) | ((uint64_t)high > 1);
}

/* Find digits and exponent, v = digits · 10^exponent, of a positive finite double. */
static uint64_t shortest_digits(uint64_t bits, int *exponent) {
    uint64_t fraction = bits & 0xfffffffffffffull, c, low, mid, high, tens, ones;
    int biased = (int)(bits >> 52 & 0x7ff), q, k, shift, even, narrow, up, down;
    const uint64_t *power;
    c = biased ? fraction | 1ull << 52 : fraction;
    q = biased ? biased - 1075 : -1074;
    even = !(c & 1), narrow = !fraction && biased > 1; /* below a power of two the neighbour is half as far */
    k = (q * 1262611 - (narrow ? 524031 : 0)) >> 22;   /* floor of the logarithm to ten of 2^q, or of 3/4 of that */
    shift = q + ((-k * 1741647) >> 19) + 1;
    power = shortest_powers[-k - SHORTEST_LOW];
    low = shortest_product(power, (4 * c - 2 + (uint64_t)narrow) << shift) + !even;
    mid = shortest_product(power, (4 * c) << shift);
    high = shortest_product(power, (4 * c + 2) << shift) - !even;
    ones = mid >> 2, tens = ones / 10;
    if (ones >= 10) {
        down = low <= 40 * tens, up = 40 * tens + 40 <= high;
        if (down != up) {
            *exponent = k + 1;
            return tens + (uint64_t)up;
        }
    }
    *exponent = k;
    down = low <= 4 * ones, up = 4 * ones + 4 <= high;
    if (down != up) return ones + (uint64_t)up;
    return ones + (uint64_t)(mid > 4 * ones + 2 || (mid == 4 * ones + 2 && (ones & 1)));
}

/* Write a finite double at `out` and return where it ends: 0.00001 to 9999999999999998.0 plainly, others as 1.5e-6. */
static char *shortest(double value, char *out) {
    uint64_t bits, digits;
    char text[20] = "";
    int exponent, count = 0, point, at;
    memcpy(&bits, &value, sizeof bits);
    if (bits >> 63) *out++ = '-';
    bits &= ~(1ull << 63);
    if (!bits) return memcpy(out, "0.0", 3), out + 3;
    digits = shortest_digits(bits, &exponent);
    while (digits % 10 == 0) digits /= 10, exponent++;
    for (at = 19; digits; digits /= 10) text[at--] = (char)('0' + digits % 10), count++;
    memmove(text, text + at + 1, (size_t)count);
    point = count + exponent; /* how many digits stand before the point */
    if (point > 16 || point < -4) {
        *out++ = text[0];
        if (count > 1) *out++ = '.';
        memcpy(out, text + 1, (size_t)count - 1), out += count - 1;
        *out++ = 'e', point--;
        if (point < 0) *out++ = '-', point = -point;
        if (point >= 100) *out++ = (char)('0' + point / 100);
        if (point >= 10) *out++ = (char)('0' + point / 10 % 10);
        *out++ = (char)('0' + point % 10);
        return out;
    }
    if (point <= 0) {
        *out++ = '0', *out++ = '.';
        for (at = point; at < 0; at++) *out++ = '0';
        return memcpy(out, text, (size_t)count), out + count;
    }
    for (at = 0; at < point; at++) *out++ = at < count ? text[at] : '0';
    *out++ = '.';
    if (count <= point) *out++ = '0';
    for (; at < count; at++) *out++ = text[at];
    return out;
}
#endif
