// Sixteen floats at a time, for everything between the products. Included once per instruction set, behind kernels.h,
// inside the same namespace. Intrinsics where x86 has them, for compilers leave half of such loops scalar; loops over
// arrays for all others. The order of operations is the same in all forms, so that those with a fused multiply-add are
// equal bit for bit.

#if defined(__GNUC__)
#define QVIT_INLINE inline __attribute__((always_inline))
#else
#define QVIT_INLINE inline
#endif

constexpr int kLanes = 16;
static_assert(kColumns % kLanes == 0);

// The same operations for one float, from which tables are made.
#if defined(QVIT_FMA)
QVIT_INLINE float mad(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
QVIT_INLINE float nearest(float x) { return __builtin_rintf(x); }
#else
QVIT_INLINE float mad(float a, float b, float c) { return a * b + c; }
QVIT_INLINE float nearest(float x) { return x + 12582912.0f - 12582912.0f; }  // halves to even, for |x| < 2^22
#endif
QVIT_INLINE float greater_of(float a, float b) { return a > b ? a : b; }  // b if a is no number
QVIT_INLINE float lesser_of(float a, float b) { return a < b ? a : b; }
QVIT_INLINE float where_positive(float x, float a, float b) { return x > 0 ? a : b; }
QVIT_INLINE float scaled(float x, float n) {  // x * 2^n
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    bits += int32_t(uint32_t(int32_t(n)) << 23);
    std::memcpy(&x, &bits, 4);
    return x;
}

#if defined(QVIT_AVX512_VNNI)

struct Lanes {
    __m512 v;
    QVIT_INLINE Lanes() : v(_mm512_setzero_ps()) {}
    QVIT_INLINE Lanes(__m512 from) : v(from) {}
    QVIT_INLINE Lanes(float x) : v(_mm512_set1_ps(x)) {}
    QVIT_INLINE explicit Lanes(const float* from) : v(_mm512_loadu_ps(from)) {}
    QVIT_INLINE void store(float* to) const { _mm512_storeu_ps(to, v); }
};
QVIT_INLINE Lanes operator+(Lanes a, Lanes b) { return _mm512_add_ps(a.v, b.v); }
QVIT_INLINE Lanes operator-(Lanes a, Lanes b) { return _mm512_sub_ps(a.v, b.v); }
QVIT_INLINE Lanes operator*(Lanes a, Lanes b) { return _mm512_mul_ps(a.v, b.v); }
QVIT_INLINE Lanes operator/(Lanes a, Lanes b) { return _mm512_div_ps(a.v, b.v); }
QVIT_INLINE Lanes mad(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
QVIT_INLINE Lanes greater_of(Lanes a, Lanes b) { return _mm512_max_ps(a.v, b.v); }
QVIT_INLINE Lanes lesser_of(Lanes a, Lanes b) { return _mm512_min_ps(a.v, b.v); }
QVIT_INLINE Lanes nearest(Lanes x) { return _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
QVIT_INLINE Lanes where_positive(Lanes x, Lanes a, Lanes b) {
    return _mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GT_OQ), a.v);
}
QVIT_INLINE Lanes scaled(Lanes x, Lanes n) {
    const __m512i power = _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.v), power));
}
QVIT_INLINE Lanes of_integers(const int32_t* from) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(from)); }
// 16 bytes of numbers that are rounded to integers, less `low`.
QVIT_INLINE __m128i bytes_of(Lanes x, int low) {
    return _mm512_cvtepi32_epi8(_mm512_sub_epi32(_mm512_cvtps_epi32(x.v), _mm512_set1_epi32(low)));
}
// 64 bytes of numbers that are rounded to integers and kept from 0 to 255; below 2^31.
QVIT_INLINE __m512i bytes_of(Lanes a, Lanes b, Lanes c, Lanes d) {
    const __m512i first = _mm512_packs_epi32(_mm512_cvtps_epi32(a.v), _mm512_cvtps_epi32(b.v)),
                  second = _mm512_packs_epi32(_mm512_cvtps_epi32(c.v), _mm512_cvtps_epi32(d.v));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(first, second));
}
QVIT_INLINE __m256 lower(Lanes x) { return _mm512_castps512_ps256(x.v); }
QVIT_INLINE __m256 upper(Lanes x) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1)); }

#elif defined(QVIT_AVX2) || defined(QVIT_AVX_VNNI)

struct Lanes {
    __m256 a, b;
    QVIT_INLINE Lanes() : a(_mm256_setzero_ps()), b(_mm256_setzero_ps()) {}
    QVIT_INLINE Lanes(__m256 first, __m256 second) : a(first), b(second) {}
    QVIT_INLINE Lanes(float x) : a(_mm256_set1_ps(x)), b(a) {}
    QVIT_INLINE explicit Lanes(const float* from) : a(_mm256_loadu_ps(from)), b(_mm256_loadu_ps(from + 8)) {}
    QVIT_INLINE void store(float* to) const { _mm256_storeu_ps(to, a), _mm256_storeu_ps(to + 8, b); }
};
QVIT_INLINE Lanes operator+(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
QVIT_INLINE Lanes operator-(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
QVIT_INLINE Lanes operator*(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
QVIT_INLINE Lanes operator/(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
QVIT_INLINE Lanes mad(Lanes x, Lanes y, Lanes z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
QVIT_INLINE Lanes greater_of(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
QVIT_INLINE Lanes lesser_of(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
QVIT_INLINE Lanes nearest(Lanes x) {
    constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, how), _mm256_round_ps(x.b, how)};
}
QVIT_INLINE Lanes where_positive(Lanes x, Lanes y, Lanes z) {
    const __m256 zero = _mm256_setzero_ps();
    return {_mm256_blendv_ps(z.a, y.a, _mm256_cmp_ps(x.a, zero, _CMP_GT_OQ)),
            _mm256_blendv_ps(z.b, y.b, _mm256_cmp_ps(x.b, zero, _CMP_GT_OQ))};
}
QVIT_INLINE __m256 scaled_half(__m256 x, __m256 n) {
    const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), power));
}
QVIT_INLINE Lanes scaled(Lanes x, Lanes n) { return {scaled_half(x.a, n.a), scaled_half(x.b, n.b)}; }
QVIT_INLINE Lanes of_integers(const int32_t* from) {
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)from)),
            _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)(from + 8)))};
}
QVIT_INLINE __m128i bytes_of_integers(__m256i a, __m256i b) {  // their last bytes
    const __m256i byte = _mm256_set1_epi32(255);
    const __m256i words =
        _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(a, byte), _mm256_and_si256(b, byte)), 0xd8);
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
QVIT_INLINE __m128i bytes_of(Lanes x, int low) {
    const __m256i taken = _mm256_set1_epi32(low);
    return bytes_of_integers(_mm256_sub_epi32(_mm256_cvtps_epi32(x.a), taken),
                             _mm256_sub_epi32(_mm256_cvtps_epi32(x.b), taken));
}
QVIT_INLINE __m256 lower(Lanes x) { return x.a; }
QVIT_INLINE __m256 upper(Lanes x) { return x.b; }

#else

struct Lanes {
    float v[kLanes];
    Lanes() : v{} {}
    Lanes(float x) {
        for (float& value : v) value = x;
    }
    explicit Lanes(const float* from) { std::memcpy(v, from, sizeof(v)); }
    void store(float* to) const { std::memcpy(to, v, sizeof(v)); }
};
#define QVIT_EACH(name, arguments, value)                   \
    QVIT_INLINE Lanes name arguments {                      \
        Lanes to;                                           \
        for (int t = 0; t < kLanes; ++t) to.v[t] = (value); \
        return to;                                          \
    }
QVIT_EACH(operator+, (const Lanes& a, const Lanes& b), a.v[t] + b.v[t])
QVIT_EACH(operator-, (const Lanes& a, const Lanes& b), a.v[t] - b.v[t])
QVIT_EACH(operator*, (const Lanes& a, const Lanes& b), a.v[t] * b.v[t])
QVIT_EACH(operator/, (const Lanes& a, const Lanes& b), a.v[t] / b.v[t])
QVIT_EACH(mad, (const Lanes& a, const Lanes& b, const Lanes& c), mad(a.v[t], b.v[t], c.v[t]))
QVIT_EACH(greater_of, (const Lanes& a, const Lanes& b), greater_of(a.v[t], b.v[t]))
QVIT_EACH(lesser_of, (const Lanes& a, const Lanes& b), lesser_of(a.v[t], b.v[t]))
QVIT_EACH(nearest, (const Lanes& x), nearest(x.v[t]))
QVIT_EACH(where_positive, (const Lanes& x, const Lanes& a, const Lanes& b), where_positive(x.v[t], a.v[t], b.v[t]))
QVIT_EACH(scaled, (const Lanes& x, const Lanes& n), scaled(x.v[t], n.v[t]))
QVIT_EACH(of_integers, (const int32_t* from), float(from[t]))
#undef QVIT_EACH

#endif

// Sums and maxima: of lanes 8 apart first, then 4, 2, 1.
#if defined(QVIT_SHUFFLES)
QVIT_INLINE float total(Lanes x) {
    const __m256 eight = _mm256_add_ps(lower(x), upper(x));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
QVIT_INLINE float greatest(Lanes x) {
    const __m256 eight = _mm256_max_ps(lower(x), upper(x));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#else
QVIT_INLINE float total(Lanes x) {
    for (int half = kLanes / 2; half; half /= 2)
        for (int t = 0; t < half; ++t) x.v[t] += x.v[t + half];
    return x.v[0];
}
QVIT_INLINE float greatest(Lanes x) {
    for (int half = kLanes / 2; half; half /= 2)
        for (int t = 0; t < half; ++t) x.v[t] = greater_of(x.v[t], x.v[t + half]);
    return x.v[0];
}
#endif

// Rows whose length is no multiple of 16 end in `count` lanes; the others are 0.
QVIT_INLINE Lanes load(const float* from, int count) {
    if (count >= kLanes) return Lanes(from);
    float part[kLanes] = {};
    for (int t = 0; t < count; ++t) part[t] = from[t];
    return Lanes(part);
}
QVIT_INLINE void store(float* to, const Lanes& x, int count) {
    if (count >= kLanes) return x.store(to);
    float part[kLanes];
    x.store(part);
    for (int t = 0; t < count; ++t) to[t] = part[t];
}

#if defined(QVIT_SHUFFLES)
using Bytes = __m128i;
QVIT_INLINE void store(uint8_t* to, Bytes bytes) { _mm_storeu_si128((__m128i*)to, bytes); }
// Places less `first`, or from 128 on if they are not in the 16 from there.
QVIT_INLINE Bytes within(Bytes at, int first) {
    return _mm_adds_epu8(_mm_sub_epi8(at, _mm_set1_epi8(char(first))), _mm_set1_epi8(0x70));
}
// Bytes of a table at places from 0 to 15; 0 at places from 128 on.
QVIT_INLINE Bytes looked_up(const uint8_t* table, Bytes at) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)table), at);
}
#if defined(QVIT_AVX512_VNNI)
QVIT_INLINE void store(uint8_t* to, __m512i bytes) { _mm512_storeu_si512(to, bytes); }
QVIT_INLINE __m512i within(__m512i at, int first) {
    return _mm512_adds_epu8(_mm512_sub_epi8(at, _mm512_set1_epi8(char(first))), _mm512_set1_epi8(0x70));
}
QVIT_INLINE __m512i looked_up(const uint8_t* table, __m512i at) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), at);
}
#endif
#else
struct Bytes {
    uint8_t v[kLanes];
};
QVIT_INLINE void store(uint8_t* to, const Bytes& bytes) { std::memcpy(to, bytes.v, kLanes); }
QVIT_INLINE Bytes within(const Bytes& at, int first) {
    Bytes to;
    for (int t = 0; t < kLanes; ++t) to.v[t] = uint8_t(at.v[t] - first) < 16 ? uint8_t(at.v[t] - first) : 128;
    return to;
}
QVIT_INLINE Bytes looked_up(const uint8_t* table, const Bytes& at) {
    Bytes to;
    for (int t = 0; t < kLanes; ++t) to.v[t] = at.v[t] < 128 ? table[at.v[t] & 15] : 0;
    return to;
}
// Of numbers that are rounded to integers, less `low`.
QVIT_INLINE Bytes bytes_of(const Lanes& x, int low) {
    Bytes to;
    for (int t = 0; t < kLanes; ++t) to.v[t] = uint8_t(int32_t(nearest(x.v[t])) - low);
    return to;
}
#endif
QVIT_INLINE void store(uint8_t* to, const Bytes& bytes, int count) {
    if (count >= kLanes) return store(to, bytes);
    uint8_t part[kLanes];
    store(part, bytes);
    for (int t = 0; t < count; ++t) to[t] = part[t];
}

// ------------------------------------------------------------------------------------------------------- functions

template <class T>
QVIT_INLINE T power_of_two(T x) {  // relative error below 2e-7 for x <= 0; next to 0 far below and for NaN
    x = greater_of(x, T(-120.0f));
    const T n = nearest(x), f = x - n;
    T p = mad(T(1.326472731307149e-3f), f, T(9.671512991189957e-3f));
    p = mad(p, f, T(5.550733581185341e-2f));
    p = mad(p, f, T(0.24022242426872253f));
    p = mad(p, f, T(0.6931470036506653f));
    return scaled(mad(p, f, T(1.0f)), n);
}
constexpr float kLog2E = 1.44269504f;

inline float logarithm(float x) {  // log2 of normal numbers above 0, absolute error below 5e-7
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    const int32_t n = (bits - 0x3f3504f3) >> 23;  // the number is 2^n times one from sqrt(1/2) to sqrt(2)
    bits -= int32_t(uint32_t(n) << 23);
    float m;
    std::memcpy(&m, &bits, 4);
    const float s = (m - 1.0f) / (m + 1.0f), u = s * s;
    float p = mad(0.32059890f, u, 0.41219858f);
    p = mad(p, u, 0.57707802f);
    p = mad(p, u, 0.96179669f);
    p = mad(p, u, 2.88539008f);
    return mad(p, s, float(n));
}

template <class T>
QVIT_INLINE T gelu(T x) {  // x * Phi(x); Phi by a rational approximation of erf, absolute error below 4e-7
    const T z = lesser_of(greater_of(x * T(0.70710678f), T(-4.0f)), T(4.0f)), u = z * z;
    T p = mad(T(1.9213761248693118e-08f), u, T(-1.9899146082025254e-06f));
    p = mad(p, u, T(0.00015549451927654445f));
    p = mad(p, u, T(0.004291824996471405f));
    p = mad(p, u, T(0.05243011564016342f));
    p = mad(p, u, T(0.21391980350017548f));
    p = mad(p, u, T(1.1283786296844482f));
    T q = mad(T(0.0010976949706673622f), u, T(0.015548829920589924f));
    q = mad(q, u, T(0.12078924477100372f));
    q = mad(q, u, T(0.5229091644287109f));
    q = mad(q, u, T(1.0f));
    return T(0.5f) * x * (T(1.0f) + z * p / q);
}

template <class T>
QVIT_INLINE T sigmoid(T x) {
    const T e = power_of_two(where_positive(x, T(0.0f) - x, x) * T(kLog2E));
    return where_positive(x, T(1.0f), e) / (T(1.0f) + e);
}

#include "integers.h"

template <Activation kind, class T>
QVIT_INLINE T activate(T x) {
    switch (kind) {
        case Activation::gelu: return gelu(x);
        case Activation::gelu_tanh: return x * sigmoid(T(1.5957691f) * (x + T(0.044715f) * x * x * x));
        case Activation::quick_gelu: return x * sigmoid(T(1.702f) * x);
        case Activation::silu: return x * sigmoid(x);
        case Activation::relu: return greater_of(x, T(0.0f));
        case Activation::gelu_ibert: return gelu_of(Gates::of(Integer::ibert), x);
        case Activation::gelu_ivit: return gelu_of(Gates::of(Integer::ivit), x);
    }
    return x;
}

// Calls `use` with the activation function as a compile-time constant.
template <class Use>
void with_activation(Activation kind, Use&& use) {
    switch (kind) {
        case Activation::gelu: return use(std::integral_constant<Activation, Activation::gelu>());
        case Activation::gelu_tanh: return use(std::integral_constant<Activation, Activation::gelu_tanh>());
        case Activation::quick_gelu: return use(std::integral_constant<Activation, Activation::quick_gelu>());
        case Activation::silu: return use(std::integral_constant<Activation, Activation::silu>());
        case Activation::relu: return use(std::integral_constant<Activation, Activation::relu>());
        case Activation::gelu_ibert: return use(std::integral_constant<Activation, Activation::gelu_ibert>());
        case Activation::gelu_ivit: return use(std::integral_constant<Activation, Activation::gelu_ivit>());
    }
}

// ----------------------------------------------------------------------------------------------------------- codes

// A grid as numbers of a type; a copy of it in a loop stays in registers, whatever bytes are stored.
template <class T>
struct Coder {
    T offset, inverse, low, high;
    int taken;
    QVIT_INLINE explicit Coder(const Grid& grid)
        : offset(grid.offset), inverse(grid.inverse), low(float(grid.low)), high(float(grid.high)), taken(grid.low) {}
    // Not rounded yet; the lowest for NaN.
    QVIT_INLINE T operator()(T x) const { return lesser_of(greater_of((x - offset) * inverse, low), high); }
    QVIT_INLINE Bytes bytes(T x) const { return bytes_of((*this)(x), taken); }
};

inline void encode(const float* x, int n, const Grid& grid, uint8_t* to) {
    const Coder<Lanes> coder(grid);
    for (int j = 0; j < n; j += kLanes) store(to + j, coder.bytes(load(x + j, n - j)), n - j);
}

// An activation and its grid as a sum of steps, for grids of few levels: fewer operations than the function, and the
// fewer the narrower. The functions fall to one lowest point and rise behind it; code = base + how many rises are at or
// below x + how many falls are at or above it. Rises are searched by halves where shuffles find a lane's next one, so
// they lie as a heap: the middle one at 1, then those in the middle of each half, to four levels.
struct Steps {
#if defined(QVIT_SHUFFLES)
    static constexpr int kRises = 15;
#else
    static constexpr int kRises = 7;
#endif
    static constexpr int kFalls = 2;
    bool there = false;
    int base = 0, levels = 3, falls = 0;   // levels of the heap: 3 or 4
    float heap[kRises + 1], fall[kFalls];  // at most 2^levels - 1; those that are not there are no numbers
    // Where AVX-512 looks 32 numbers up at once and steps are far enough apart: the cell of x is x * by + from,
    // rounded, and has one step at most: the last byte of its codes before it, the next byte from it on.
    static constexpr int kCells = 32;
    bool in_cells = false;
    float by = 0, from = 0, step[kCells];
    int32_t codes[kCells];

    int cell(float x) const { return int(nearest(lesser_of(greater_of(mad(x, by, from), 0.0f), kCells - 1.0f))); }
    // For `count` steps in order, and the codes before the first and from each on.
    void fill_cells(const float* steps, const int* code, int count) {
        by = (kCells - 1.0f) / (steps[count - 1] - steps[0]), from = -steps[0] * by;
        for (int c = 0, done = 0; c < kCells; ++c) {
            const bool has = done < count && cell(steps[done]) == c;
            step[c] = has ? steps[done] : std::numeric_limits<float>::quiet_NaN();
            codes[c] = code[done] | code[done + has] << 8;
            done += has;
            in_cells = done == count;
        }
    }
};

template <Activation kind>
Steps steps_of(const Grid& grid) {
    Steps steps;
    // Forms on integers may rise and fall by a unit on their way.
    const bool whole = kind == Activation::gelu_ibert || kind == Activation::gelu_ivit;
    if (whole || grid.high - grid.low > Steps::kRises) return steps;
    const Coder<float> coder(grid);
    auto code = [&](float x) {
        return int(nearest(coder(activate<kind>(x)))) - grid.low;
    };
    float bottom = 0;
    for (int i = -12000; i < 0; ++i)
        if (activate<kind>(float(i) / 1000) < activate<kind>(bottom)) bottom = float(i) / 1000;
    // The first x from `from`, whose code is lower, towards `to` that has a code of at least `wanted`.
    auto first = [&](float from, float to, int wanted) {
        for (float middle; middle = from + (to - from) / 2, middle != from && middle != to;)
            (code(middle) >= wanted ? to : from) = middle;
        return to;
    };
    constexpr float kFar = 1e30f, kNone = std::numeric_limits<float>::quiet_NaN();
    float rises[Steps::kRises];
    std::fill_n(rises, Steps::kRises, kNone), std::fill_n(steps.heap, Steps::kRises + 1, kNone);
    std::fill_n(steps.fall, Steps::kFalls, kNone);
    steps.base = code(bottom);
    const int count = code(kFar) - steps.base;
    for (int i = 0; i < count; ++i) rises[i] = first(bottom, kFar, steps.base + 1 + i);
    steps.levels = count > 7 ? 4 : 3;
    for (int level = 0; level < steps.levels; ++level)
        for (int i = 0; i < 1 << level; ++i)
            steps.heap[(1 << level) + i] = rises[((2 * i + 1) << (steps.levels - 1 - level)) - 1];
    steps.falls = code(-100.0f) - steps.base;
    if (steps.falls > Steps::kFalls) return steps;
    for (int i = 0; i < steps.falls; ++i) steps.fall[i] = first(bottom, -100.0f, steps.base + 1 + i);
    steps.there = true;
#if defined(QVIT_AVX512_VNNI)
    float all[Steps::kFalls + Steps::kRises];
    int codes[Steps::kFalls + Steps::kRises + 1], at = 0;
    for (int i = steps.falls; i--;) codes[at] = steps.base + 1 + i, all[at++] = std::nextafter(steps.fall[i], kFar);
    codes[at] = steps.base;
    for (int i = 0; i < count; ++i) all[at++] = rises[i], codes[at] = steps.base + 1 + i;
    if (at > 1) steps.fill_cells(all, codes, at);
#endif
    return steps;
}

#if defined(QVIT_AVX512_VNNI)

class StepCoder {
  public:
    QVIT_INLINE explicit StepCoder(const Steps& steps)
        : heap_(_mm512_loadu_ps(steps.heap)), levels_(steps.levels), falls_(steps.falls) {
        for (int i = 0; i < Steps::kFalls; ++i) fall_[i] = _mm512_set1_ps(steps.fall[i]);
        begin_ = _mm512_set1_epi32(steps.base - (1 << steps.levels));
        in_cells_ = steps.in_cells, by_ = Lanes(steps.by), from_ = Lanes(steps.from);
        for (int i = 0; i < 2; ++i) {
            step_[i] = _mm512_loadu_ps(steps.step + 16 * i);
            codes_[i] = _mm512_loadu_si512(steps.codes + 16 * i);
        }
    }
    QVIT_INLINE bool in_cells() const { return in_cells_; }
    QVIT_INLINE Bytes bytes_by_cell(Lanes x) const {
        const Lanes place = lesser_of(greater_of(mad(x, by_, from_), Lanes(0.0f)), Lanes(Steps::kCells - 1.0f));
        const __m512i cell = _mm512_cvtps_epi32(place.v);
        const __mmask16 from = _mm512_cmp_ps_mask(x.v, _mm512_permutex2var_ps(step_[0], cell, step_[1]), _CMP_GE_OQ);
        const __m512i codes = _mm512_permutex2var_epi32(codes_[0], cell, codes_[1]);
        return _mm512_cvtepi32_epi8(_mm512_mask_srli_epi32(codes, from, codes, 8));
    }
    QVIT_INLINE Bytes bytes(Lanes x) const { return levels_ > 3 ? found<4>(x) : found<3>(x); }

  private:
    template <int levels>
    QVIT_INLINE Bytes found(Lanes x) const {
        const __m512i one = _mm512_set1_epi32(1);
        __m512i at = one;
#pragma GCC unroll 4
        for (int level = 0; level < levels; ++level) {
            const __mmask16 above = _mm512_cmp_ps_mask(x.v, _mm512_permutexvar_ps(at, heap_), _CMP_GE_OQ);
            at = _mm512_add_epi32(at, at);
            at = _mm512_mask_add_epi32(at, above, at, one);
        }
        if (falls_ > 0) at = _mm512_mask_add_epi32(at, _mm512_cmp_ps_mask(x.v, fall_[0], _CMP_LE_OQ), at, one);
        if (falls_ > 1) at = _mm512_mask_add_epi32(at, _mm512_cmp_ps_mask(x.v, fall_[1], _CMP_LE_OQ), at, one);
        return _mm512_cvtepi32_epi8(_mm512_add_epi32(at, begin_));
    }

    __m512 heap_, fall_[Steps::kFalls], step_[2];
    __m512i begin_, codes_[2];
    Lanes by_, from_;
    int levels_, falls_;
    bool in_cells_;
};

#elif defined(QVIT_SHUFFLES)

class StepCoder {
  public:
    QVIT_INLINE explicit StepCoder(const Steps& steps)
        : first_(_mm256_loadu_ps(steps.heap)),
          second_(_mm256_loadu_ps(steps.heap + 8)),
          levels_(steps.levels),
          falls_(steps.falls) {
        for (int i = 0; i < Steps::kFalls; ++i) fall_[i] = _mm256_set1_ps(steps.fall[i]);
        begin_ = _mm256_set1_epi32(steps.base - (1 << steps.levels));
    }
    QVIT_INLINE Bytes bytes(Lanes x) const { return bytes_of_integers(half(x.a), half(x.b)); }

  private:
    QVIT_INLINE __m256i half(__m256 x) const {
        __m256i at = _mm256_set1_epi32(1);
        for (int level = 0; level < levels_; ++level) {
            const __m256 rise = _mm256_permutevar8x32_ps(level < 3 ? first_ : second_, at);
            at = _mm256_sub_epi32(_mm256_add_epi32(at, at), _mm256_castps_si256(_mm256_cmp_ps(x, rise, _CMP_GE_OQ)));
        }
        at = _mm256_add_epi32(at, begin_);
        for (int i = 0; i < falls_; ++i)
            at = _mm256_sub_epi32(at, _mm256_castps_si256(_mm256_cmp_ps(x, fall_[i], _CMP_LE_OQ)));
        return at;
    }

    __m256 first_, second_, fall_[Steps::kFalls];
    __m256i begin_;
    int levels_, falls_;
};

#else

class StepCoder {
  public:
    explicit StepCoder(const Steps& steps) : steps_(steps) {}
    QVIT_INLINE Bytes bytes(const Lanes& x) const {
        Bytes to;
        for (int t = 0; t < kLanes; ++t) {
            int code = steps_.base;
            for (int k = 1; k <= Steps::kRises; ++k) code += x.v[t] >= steps_.heap[k];
            for (int k = 0; k < Steps::kFalls; ++k) code += x.v[t] <= steps_.fall[k];
            to.v[t] = uint8_t(code);
        }
        return to;
    }

  private:
    const Steps steps_;
};

#endif
