/* What the native code shares. Eight bytes behind a stream's end are read by `word`. */

#ifndef BIVLM_NATIVE_H
#define BIVLM_NATIVE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define X86 1
#define AVX2 __attribute__((target("avx2")))
#if defined(__linux__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("avx2", "default")))
#endif
#endif
#ifndef WIDEST
#define WIDEST
#endif
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { SHORTEST = 64 }; /* of the sequences that bite their tail */

/* Up to 57 bits of a stream from one on, the first one highest. */
static inline uint64_t word(const uint8_t *stream, int64_t bit) {
    uint64_t bytes;
    memcpy(&bytes, stream + (bit >> 3), 8);
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    bytes = __builtin_bswap64(bytes);
#endif
    return bytes << (bit & 7);
}

#endif
