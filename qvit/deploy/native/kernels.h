// Products of unsigned and signed bytes with exact 32-bit sums, one small tile at a time; the inner loops of the
// engine. Included once per instruction set, inside a namespace of its own, with one of QVIT_AVX512_VNNI,
// QVIT_AVX_VNNI, QVIT_AVX2, QVIT_DOT defined, or none of them for plain C++. All forms are equal bit for bit.
//
//   out[i][j] = start[j] + sum_k a[i][k] * w[k][j]        i < m, j < kColumns
//
// The left operand has rows of bytes; the right one is packed in panels of kColumns columns, four bytes of a column
// side by side: panel[k/4][j][k%4].
//
//   VNNI    vpdpbusd adds four products to an int32 without saturation
//   AVX2    pmaddubsw adds two products in int16. As many groups of four are summed there as cannot overflow, which the
//           widths of both operands decide: 2 * n * max|a| * max|w| <= 32767; then they are widened. Where not even one
//           group fits (8 by 8 bits), a - 128 is multiplied as |a - 128| by w with its sign; w = -128, of which two
//           would not fit, counts as -127 there and is mended afterwards (`Panels::lowest`)
//   DOT     sdot of AArch64 on a - 128

// What `tile` is told of how to sum: so many groups in int16, or one of these.
constexpr int kTakes128 = 0, kPlain = -1;

inline int32_t four(const uint8_t* a) {
    int32_t value;
    std::memcpy(&value, a, 4);
    return value;
}

#if defined(QVIT_AVX512_VNNI)

constexpr int kColumns = 32, kRows = 12;
inline int way_of(int, int) { return kPlain; }

// As an instruction with its sum in place: for the intrinsic GCC 12 copies every sum twice in each step.
inline void dot(__m512i& sum, __m512i a, __m512i w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w)); }

template <int M>
void rows_of_tile(const uint8_t* a, int64_t lda, const int8_t* w, int groups, int, const int32_t* start, int32_t* out) {
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

#elif defined(QVIT_AVX_VNNI)

constexpr int kColumns = 16, kRows = 6;
inline int way_of(int, int) { return kPlain; }

#if defined(QVIT_EVEX)  // the same instruction as processors with AVX-512 encode it
#define QVIT_DOT_NAME "vpdpbusd"
#else
#define QVIT_DOT_NAME "%{vex%} vpdpbusd"
#endif
inline void dot(__m256i& sum, __m256i a, __m256i w) { asm(QVIT_DOT_NAME " %2, %1, %0" : "+x"(sum) : "x"(a), "x"(w)); }
#undef QVIT_DOT_NAME

template <int M>
void rows_of_tile(const uint8_t* a, int64_t lda, const int8_t* w, int groups, int, const int32_t* start, int32_t* out) {
    __m256i sum[M][2];
    const __m256i first = _mm256_loadu_si256((const __m256i*)start),
                  second = _mm256_loadu_si256((const __m256i*)(start + 8));
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) sum[i][0] = first, sum[i][1] = second;
    for (int g = 0; g < groups; ++g) {
        const __m256i w0 = _mm256_loadu_si256((const __m256i*)(w + int64_t(g) * 64));
        const __m256i w1 = _mm256_loadu_si256((const __m256i*)(w + int64_t(g) * 64 + 32));
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const __m256i x = _mm256_set1_epi32(four(a + i * lda + 4 * g));
            dot(sum[i][0], x, w0);
            dot(sum[i][1], x, w1);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
        _mm256_storeu_si256((__m256i*)(out + i * 16), sum[i][0]);
        _mm256_storeu_si256((__m256i*)(out + i * 16 + 8), sum[i][1]);
    }
}

#elif defined(QVIT_AVX2)

constexpr int kColumns = 16, kRows = 6;
inline int way_of(int most_left, int most_right) {
    const int64_t each = 2LL * most_left * most_right;
    if (each <= 32767) return each == 0 ? 1 << 20 : int(32767 / each);
    return kTakes128;
}

// Two instructions in place, with w from memory: 12 sums, a and one product are all that 16 registers hold, and GCC
// would rather keep w there and spill sums.
inline void add_products(__m256i& sum, __m256i a, const int8_t* w) {
    __m256i product;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(a), "m"(*(const __m256i_u*)w));
}

template <int M>
void narrow_rows(const uint8_t* a, int64_t lda, const int8_t* w, int groups, int narrow, const int32_t* start,
                 int32_t* out) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int begin = 0; begin < groups; begin += narrow) {
        const int end = narrow < groups - begin ? begin + narrow : groups;
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
void wide_rows(const uint8_t* a, int64_t lda, const int8_t* w, int groups, const int32_t* start, int32_t* out) {
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

template <int M>
void rows_of_tile(const uint8_t* a, int64_t lda, const int8_t* w, int groups, int way, const int32_t* start,
                  int32_t* out) {
    if (way == kTakes128) return wide_rows<M>(a, lda, w, groups, start, out);
    narrow_rows<M>(a, lda, w, groups, way, start, out);
}

#elif defined(QVIT_DOT)

constexpr int kColumns = 16, kRows = 6;
inline int way_of(int, int) { return kTakes128; }

template <int M>
void rows_of_tile(const uint8_t* a, int64_t lda, const int8_t* w, int groups, int, const int32_t* start, int32_t* out) {
    int32x4_t sum[M][4];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int h = 0; h < 4; ++h) sum[i][h] = vld1q_s32(start + 4 * h);
    for (int g = 0; g < groups; ++g) {
        int8x16_t part[4];
#pragma GCC unroll 4
        for (int h = 0; h < 4; ++h) part[h] = vld1q_s8(w + int64_t(g) * 64 + 16 * h);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const int8x16_t x = vreinterpretq_s8_u8(
                veorq_u8(vreinterpretq_u8_s32(vdupq_n_s32(four(a + i * lda + 4 * g))), vdupq_n_u8(0x80)));
#pragma GCC unroll 4
            for (int h = 0; h < 4; ++h) sum[i][h] = vdotq_s32(sum[i][h], part[h], x);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int h = 0; h < 4; ++h) vst1q_s32(out + i * 16 + 4 * h, sum[i][h]);
}

#else

constexpr int kColumns = 16, kRows = 6;
inline int way_of(int, int) { return kPlain; }

template <int M>
void rows_of_tile(const uint8_t* a, int64_t lda, const int8_t* w, int groups, int, const int32_t* start, int32_t* out) {
    for (int i = 0; i < M; ++i) {
        int32_t sum[kColumns];
        for (int j = 0; j < kColumns; ++j) sum[j] = start[j];
        for (int g = 0; g < groups; ++g)
            for (int j = 0; j < kColumns; ++j)
                for (int t = 0; t < 4; ++t)
                    sum[j] += int32_t(a[i * lda + 4 * g + t]) * int32_t(w[(int64_t(g) * kColumns + j) * 4 + t]);
        std::memcpy(out + i * kColumns, sum, sizeof(sum));
    }
}

#endif

inline void tile(int m, const uint8_t* a, int64_t lda, const int8_t* w, int groups, int way, const int32_t* start,
                 int32_t* out) {
    switch (m) {
#define QVIT_ROWS(n) \
    case n: return rows_of_tile<n>(a, lda, w, groups, way, start, out);
        QVIT_ROWS(1)
        QVIT_ROWS(2)
        QVIT_ROWS(3)
        QVIT_ROWS(4)
        QVIT_ROWS(5)
        QVIT_ROWS(6)
#if defined(QVIT_AVX512_VNNI)
        QVIT_ROWS(7) QVIT_ROWS(8) QVIT_ROWS(9) QVIT_ROWS(10) QVIT_ROWS(11) QVIT_ROWS(12)
#endif
#undef QVIT_ROWS
    }
}

// How a left operand that is stored from 0 is multiplied, and what sums start at: low * sum(w).
struct Left {
    int way = 0;
    Buffer<int32_t> start;
};

// A right operand (k, n) in panels. Left operands are on one grid, or on two: that of prefix tokens and the others'.
struct Panels {
    struct Place {
        int row, column;
    };
    int n = 0, k = 0, groups = 0;
    Buffer<int8_t> bytes;
    Buffer<int32_t> sums;  // of w by column
    Left left, prefix;
    std::vector<std::vector<Place>> lowest;  // where w is -128 and stored as -127, by panel

    // To be called once w and its sums are there, for each grid of left operands. `most` is the largest |w|.
    void begin(Left& of, int low, int most_left, int most) {
        of.way = way_of(most_left, most);
        const int taken = low + (of.way == kTakes128 ? 128 : 0);
        of.start.resize(sums.size());
        for (size_t j = 0; j < sums.size(); ++j) of.start[j] = sums[j] * taken;
#if defined(QVIT_AVX2)
        if (of.way != kTakes128 || most < 128 || !lowest.empty()) return;
        lowest.resize(size_t(round_up(n, kColumns) / kColumns));
        for (size_t i = 0; i < bytes.size(); ++i) {
            if (bytes[i] != -128) continue;
            const int panel = int(i / (size_t(groups) * kColumns * 4)),
                      inside = int(i % (size_t(groups) * kColumns * 4));
            lowest[size_t(panel)].push_back({inside / (kColumns * 4) * 4 + inside % 4, inside / 4 % kColumns});
            bytes[i] = -127;
        }
#endif
    }
};

// Returns the largest |w|.
inline int fill_panels(Panels& to, int n, int k, const int8_t* w, int64_t row) {
    const int columns = round_up(n, kColumns);
    to.n = n, to.k = k, to.groups = (k + 3) / 4;
    to.bytes.assign(size_t(columns) * to.groups * 4, 0);
    to.sums.assign(size_t(columns), 0), to.lowest.clear();
    int most = 0;
    for (int j = 0; j < n; ++j)
        for (int i = 0; i < k; ++i) {
            const int8_t value = w[j * row + i];
            to.bytes[(size_t(j / kColumns) * to.groups + i / 4) * kColumns * 4 + (j % kColumns) * 4 + i % 4] = value;
            to.sums[size_t(j)] += value;
            most = std::max(most, std::abs(int(value)));
        }
    return most;
}

// Of a right operand whose bytes are there: the sums of w by column, which are its product with ones.
inline void sum_columns(Panels& to) {
    const int way = way_of(1, 128);
    const Buffer<uint8_t> ones(size_t(to.groups) * 4, way == kTakes128 ? 129 : 1);
    alignas(64) static const int32_t zeros[kColumns] = {};
    const int columns = round_up(to.n, kColumns);
    to.sums.resize(size_t(columns));
    for (int column = 0; column < columns; column += kColumns)
        tile(1, ones.data(), 0, to.bytes.data() + size_t(column) * to.groups * 4, to.groups, way, zeros,
             to.sums.data() + column);
}

// Four rows of bytes, a byte of each in turn.
inline void interleave(const int8_t* __restrict a, const int8_t* __restrict b, const int8_t* __restrict c,
                       const int8_t* __restrict d, int n, int8_t* __restrict to) {
    using Word = uint32_t __attribute__((may_alias));
    auto* words = reinterpret_cast<Word*>(to);
    for (int t = 0; t < n; ++t)
        words[t] = uint32_t(uint8_t(a[t])) | uint32_t(uint8_t(b[t])) << 8 | uint32_t(uint8_t(c[t])) << 16 |
                   uint32_t(uint8_t(d[t])) << 24;
}

// Even parts of at most `most` of a number of rows.
inline int even(int rows, int most) {
    const int parts = (rows + most - 1) / most;
    return (rows + parts - 1) / parts;
}

// The sums of at most kRows rows with the panel of columns that begins at `column`.
inline void multiply_tile(int rows, const uint8_t* a, int64_t lda, const Panels& w, const Left& left, int column,
                          int32_t* sums) {
    const int8_t* panel = w.bytes.data() + size_t(column / kColumns) * w.groups * kColumns * 4;
    tile(rows, a, lda, panel, w.groups, left.way, left.start.data() + column, sums);
    if (w.lowest.empty()) return;
    const int taken = left.way == kTakes128 ? 128 : 0;
    for (const auto& place : w.lowest[size_t(column / kColumns)])
        for (int r = 0; r < rows; ++r) sums[r * kColumns + place.column] -= a[r * lda + place.row] - taken;
}

// All products of m rows with panels: `use(row, rows, column, columns, sums)` gets tile after tile.
template <class Use>
void multiply(int m, const uint8_t* a, int64_t lda, const Panels& w, const Left& left, Use&& use) {
    alignas(64) int32_t sums[kRows * kColumns];
    const int step = even(m, kRows);
    for (int column = 0; column < w.n; column += kColumns)
        for (int row = 0; row < m; row += step) {
            const int rows = std::min(step, m - row);
            multiply_tile(rows, a + row * lda, lda, w, left, column, sums);
            use(row, rows, column, std::min(kColumns, w.n - column), sums);
        }
}
