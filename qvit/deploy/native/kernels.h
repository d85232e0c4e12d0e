// Products of unsigned and signed bytes with exact 32-bit sums, one small tile at a time; the inner loops of the engine.
//
//   out[i][j] = start[j] + sum_k a[i][k] * w[k][j]        i < m, j < NR
//
// The left operand has rows of bytes; the right one is packed in panels of NR columns, four bytes of a column side by
// side: panel[k/4][j][k%4]. Three forms, equal bit for bit:
//
//   vnni      AVX-512 VNNI: vpdpbusd adds four products to an int32 without saturation
//   avx2      pmaddubsw adds two products in int16. As many groups of four are summed there as cannot overflow, which
//             the widths of both operands decide: 2 * n * max|a| * max|w| <= 32767; then they are widened. Where not
//             even one group fits (8 by 8 bits), a - 128 is multiplied as |a - 128| by w with its sign
//   portable  plain C++
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace qvit {

using Tile = void (*)(int m, const uint8_t* a, int64_t lda, const int8_t* w, int groups, int narrow,
                      const int32_t* start, int32_t* out);

struct Form {
    const char* name;
    int columns;  // NR
    int rows;     // the most rows of a tile
    Tile tile;
    int (*narrow)(int most_left, int most_right);  // what `tile` is told of operands with these largest values
    bool one_way;                                  // whether that is always the same
};

// How a tile of the AVX2 form sums: so many groups in int16, or one of these. Other forms have a single way.
constexpr int kWide = 0, kPlain = -1;

constexpr int kMostRows = 12, kMostColumns = 32;

template <int NR>
void portable_tile(int m, const uint8_t* a, int64_t lda, const int8_t* w, int groups, int, const int32_t* start,
                   int32_t* out) {
    for (int i = 0; i < m; ++i) {
        int32_t sum[NR];
        for (int j = 0; j < NR; ++j) sum[j] = start[j];
        for (int g = 0; g < groups; ++g)
            for (int j = 0; j < NR; ++j)
                for (int t = 0; t < 4; ++t)
                    sum[j] += int32_t(a[i * lda + 4 * g + t]) * int32_t(w[(int64_t(g) * NR + j) * 4 + t]);
        std::memcpy(out + i * NR, sum, sizeof(sum));
    }
}

inline int32_t four(const uint8_t* a) {
    int32_t value;
    std::memcpy(&value, a, 4);
    return value;
}

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define QVIT_VNNI 1
// As an instruction with its sum in place: for the intrinsic GCC 12 copies every sum twice in each step.
inline void dot(__m512i& sum, __m512i a, __m512i w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w)); }

template <int M>
void vnni_rows(const uint8_t* a, int64_t lda, const int8_t* w, int groups, const int32_t* start, int32_t* out) {
    __m512i sum[M][2];
    const __m512i first = _mm512_loadu_si512(start), second = _mm512_loadu_si512(start + 16);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) sum[i][0] = first, sum[i][1] = second;
    for (int g = 0; g < groups; ++g) {
        const __m512i w0 = _mm512_loadu_si512(w + int64_t(g) * 128), w1 = _mm512_loadu_si512(w + int64_t(g) * 128 + 64);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const __m512i x = _mm512_set1_epi32(four(a + i * lda + 4 * g));
            dot(sum[i][0], x, w0);
            dot(sum[i][1], x, w1);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
        _mm512_storeu_si512(out + i * 32, sum[i][0]);
        _mm512_storeu_si512(out + i * 32 + 16, sum[i][1]);
    }
}

inline void vnni_tile(int m, const uint8_t* a, int64_t lda, const int8_t* w, int groups, int, const int32_t* start,
                      int32_t* out) {
    switch (m) {
#define QVIT_ROWS(n) case n: return vnni_rows<n>(a, lda, w, groups, start, out);
        QVIT_ROWS(1) QVIT_ROWS(2) QVIT_ROWS(3) QVIT_ROWS(4) QVIT_ROWS(5) QVIT_ROWS(6) QVIT_ROWS(7) QVIT_ROWS(8)
        QVIT_ROWS(9) QVIT_ROWS(10) QVIT_ROWS(11) QVIT_ROWS(12)
#undef QVIT_ROWS
    }
}
#endif

#if defined(__AVX2__)
#define QVIT_AVX2 1
// Two instructions in place, with w from memory: 12 sums, a and one product are all that 16 registers hold, and GCC
// would rather keep w there and spill sums.
inline void add_products(__m256i& sum, __m256i a, const int8_t* w) {
    __m256i product;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
        : "+x"(sum), "=&x"(product)
        : "x"(a), "m"(*(const __m256i_u*)w));
}

template <int M>
void avx2_narrow(const uint8_t* a, int64_t lda, const int8_t* w, int groups, int narrow, const int32_t* start,
                 int32_t* out) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int begin = 0; begin < groups; begin += narrow) {
        const int end = begin + narrow < groups ? begin + narrow : groups;
        __m256i sum[M][2];
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
        for (int g = begin; g < end; ++g) {
#pragma GCC unroll 16
            for (int i = 0; i < M; ++i) {
                const __m256i x = _mm256_set1_epi32(four(a + i * lda + 4 * g));
                add_products(sum[i][0], x, w + int64_t(g) * 64);
                add_products(sum[i][1], x, w + int64_t(g) * 64 + 32);
            }
        }
        // Widened into `out`, which begins as `start`.
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                auto* to = (__m256i*)(out + i * 16 + 8 * h);
                const __m256i before = _mm256_loadu_si256(begin ? to : (const __m256i*)(start + 8 * h));
                _mm256_storeu_si256(to, _mm256_add_epi32(before, _mm256_madd_epi16(sum[i][h], ones)));
            }
    }
}

// `start` is that of a - 128, and no w is -128: |a - 128| <= 128 and |w| <= 127 fit two at a time in int16.
template <int M>
void avx2_wide(const uint8_t* a, int64_t lda, const int8_t* w, int groups, const int32_t* start, int32_t* out) {
    const __m256i ones = _mm256_set1_epi16(1), half = _mm256_set1_epi8(char(0x80));
    __m256i sum[M][2];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
        sum[i][0] = _mm256_loadu_si256((const __m256i*)start);
        sum[i][1] = _mm256_loadu_si256((const __m256i*)(start + 8));
    }
    for (int g = 0; g < groups; ++g) {
        const __m256i w0 = _mm256_loadu_si256((const __m256i*)(w + int64_t(g) * 64));
        const __m256i w1 = _mm256_loadu_si256((const __m256i*)(w + int64_t(g) * 64 + 32));
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const __m256i x = _mm256_xor_si256(_mm256_set1_epi32(four(a + i * lda + 4 * g)), half);
            const __m256i size = _mm256_abs_epi8(x);
            const __m256i p0 = _mm256_maddubs_epi16(size, _mm256_sign_epi8(w0, x));
            const __m256i p1 = _mm256_maddubs_epi16(size, _mm256_sign_epi8(w1, x));
            sum[i][0] = _mm256_add_epi32(sum[i][0], _mm256_madd_epi16(p0, ones));
            sum[i][1] = _mm256_add_epi32(sum[i][1], _mm256_madd_epi16(p1, ones));
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) _mm256_storeu_si256((__m256i*)(out + i * 16 + 8 * h), sum[i][h]);
}

inline int avx2_narrow_groups(int most_left, int most_right) {
    const int64_t each = 2LL * most_left * most_right;
    if (each <= 32767) return each == 0 ? 1 << 20 : int(32767 / each);
    return most_right <= 127 ? kWide : kPlain;
}

inline void avx2_tile(int m, const uint8_t* a, int64_t lda, const int8_t* w, int groups, int narrow,
                      const int32_t* start, int32_t* out) {
    if (narrow == kPlain) return portable_tile<16>(m, a, lda, w, groups, narrow, start, out);
    switch (m) {
#define QVIT_ROWS(n)                                                          \
    case n:                                                                   \
        return narrow ? avx2_narrow<n>(a, lda, w, groups, narrow, start, out) \
                      : avx2_wide<n>(a, lda, w, groups, start, out);
        QVIT_ROWS(1) QVIT_ROWS(2) QVIT_ROWS(3) QVIT_ROWS(4) QVIT_ROWS(5) QVIT_ROWS(6)
#undef QVIT_ROWS
    }
}
#endif

inline int one_way(int, int) { return kPlain; }

// The forms that this library was compiled for, the fastest first.
inline const Form* forms(int& count) {
    static const Form found[] = {
#ifdef QVIT_VNNI
        {"AVX-512 VNNI", 32, 12, vnni_tile, one_way, true},
#endif
#ifdef QVIT_AVX2
        {"AVX2", 16, 6, avx2_tile, avx2_narrow_groups, false},
#endif
        {"portable", 16, 8, portable_tile<16>, one_way, true},
    };
    count = int(sizeof(found) / sizeof(found[0]));
    return found;
}

}  // namespace qvit
