// Quantization in one pass over memory, for `qvit/kernels/cpu.py`, which compiles this file on first use.
//
// The arithmetic is that of `functional.py`, in the same order and without contraction, so values are equal bit for bit:
//
//     u = (x - offset) / scale      c = min(max(u, low), high)      q = round(c)      x^ = q*scale + offset
//
// A tensor comes as four sizes with strides; the last stride is 1. Scales, offsets and limits come as flat arrays with
// one entry per group (or a single one: a bit of `single`), and the four strides with which the group of an element is
// found. Where a group is constant over the last two sizes (per tensor, per head), they form a tile that one accumulator
// serves; else (per channel) sums are kept for each entry. Sums run over blocks in float, from block to block in double,
// and are added up in the order of the threads: the same numbers on every run with as many threads. LANES elements at a
// time fill a register of the processor, since GCC takes wider vectors apart one number after the other; a sum has SUMS
// parts on all of them, so AVX2 and AVX-512 yield the same bits.
//
// Float and bfloat16 are read and written; arithmetic is in float. No header of PyTorch is needed.

#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int SUMS = 16;            // each sum is kept in as many parts, whatever a register holds
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PARTS = SUMS / LANES;
constexpr int64_t BLOCK = 16384;    // elements that one float accumulator may sum up
constexpr int64_t SERIAL = 32768;   // below this, threads cost more than they bring

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

struct BFloat16 { uint16_t bits; };

inline Vec to_float(Vec v) { return v; }
inline Vec to_float(Halves v) { return (Vec)(__builtin_convertvector(v, Bits) << 16); }

inline void from_float(Vec v, Vec& out) { out = v; }
inline void from_float(Vec v, Halves& out) {
    const Bits bits = (Bits)v;
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits nan = (Bits)(v != v);
    out = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), Halves);
}
inline void from_float(Vec v, Bytes& out) {
    const Ints whole = __builtin_convertvector(v, Ints);
#if defined(__AVX2__) && !defined(__AVX512F__)  // no instruction narrows, and GCC would take every number by itself
    const __m256i lowest = _mm256_shuffle_epi8((__m256i)whole, _mm256_set1_epi32(0x0c080400));
    const int32_t halves[2] = {_mm256_extract_epi32(lowest, 0), _mm256_extract_epi32(lowest, 4)};
    std::memcpy(&out, halves, sizeof out);
#else
    out = __builtin_convertvector(whole, Bytes);
#endif
}

template <class T> struct Packed;
template <> struct Packed<float> { typedef Vec type; };
template <> struct Packed<BFloat16> { typedef Halves type; };
template <> struct Packed<int8_t> { typedef Bytes type; };

// Copies `count` < LANES elements in at most four moves of known sizes, which cost far less than a call.
template <class T> inline void copy_some(T* to, const T* from, int64_t count) {
    if (count & 8) { std::memcpy(to, from, 8 * sizeof(T)); to += 8; from += 8; }
    if (count & 4) { std::memcpy(to, from, 4 * sizeof(T)); to += 4; from += 4; }
    if (count & 2) { std::memcpy(to, from, 2 * sizeof(T)); to += 2; from += 2; }
    if (count & 1) std::memcpy(to, from, sizeof(T));
}

// The first `count` of LANES elements; the rest is zero.
template <class T> inline Vec load(const T* from, int64_t count) {
    typename Packed<T>::type raw = {};
    if (count >= LANES) std::memcpy(&raw, from, sizeof raw);
    else copy_some((T*)&raw, from, count);
    return to_float(raw);
}
inline Ints load_ints(const int32_t* from, int64_t count) {
    Ints raw = {};
    if (count >= LANES) std::memcpy(&raw, from, sizeof raw);
    else copy_some((int32_t*)&raw, from, count);
    return raw;
}
template <class T> inline void store(T* to, Vec values, int64_t count) {
    typename Packed<T>::type raw;
    from_float(values, raw);
    if (count >= LANES) std::memcpy(to, &raw, sizeof raw);
    else copy_some(to, (const T*)&raw, count);
}

inline Vec splat(float value) { return Vec{} + value; }

// Half to even, exact for |c| < 2^22; NaN stays NaN.
inline Vec round_even(Vec c) {
    const float magic = 12582912.0f;
    return (c + magic) - magic;
}
inline Vec clamp(Vec u, Vec low, Vec high) {
    Vec c = low > u ? low : u;
    return high < c ? high : c;
}

struct Shape {
    int64_t size[4], x[4], group[4], out[4];
    int64_t elements() const { return size[0] * size[1] * size[2] * size[3]; }
};

// One of a grid's numbers for each group; `stride` is 0 where all groups share it.
struct Numbers {
    const float* values;
    int64_t stride;
    float at(int64_t group) const { return values[group * stride]; }
    Vec lanes(int64_t group, int64_t count) const { return stride ? load(values + group, count) : splat(*values); }
};

// Scale, offset (or none), low and high of a grid, perhaps those of a second one, and a share of that.
struct Grids {
    Numbers numbers[9];
    Grids(const float* const* values, int single) {
        for (int i = 0; i < 9; ++i) numbers[i] = {values[i], !(single >> i & 1)};
    }
    bool are_two() const { return numbers[4].values; }
};

// Where a piece of work begins, and how large it is: rows × columns elements that share the first two indices.
struct Piece { int64_t x, group, out, rows, columns; };

// All work, cut into pieces of at most BLOCK elements, of one row each where groups differ by row.
struct Work {
    const Shape& shape;
    int64_t rows_per_piece, columns_per_piece, row_pieces, column_pieces, count;

    explicit Work(const Shape& s) : shape(s) {
        columns_per_piece = s.size[3] < BLOCK ? s.size[3] : BLOCK;
        rows_per_piece = s.group[2] == 0 && columns_per_piece ? BLOCK / columns_per_piece : 1;
        if (rows_per_piece > s.size[2]) rows_per_piece = s.size[2];
        if (rows_per_piece < 1) rows_per_piece = 1;
        row_pieces = (s.size[2] + rows_per_piece - 1) / rows_per_piece;
        column_pieces = columns_per_piece ? (s.size[3] + columns_per_piece - 1) / columns_per_piece : 0;
        count = s.size[0] * s.size[1] * row_pieces * column_pieces;
    }
    Piece piece(int64_t index) const {
        const int64_t column = index % column_pieces * columns_per_piece;
        index /= column_pieces;
        const int64_t row = index % row_pieces * rows_per_piece;
        index /= row_pieces;
        const int64_t b = index % shape.size[1], a = index / shape.size[1];
        const auto at = [&](const int64_t* s) { return a * s[0] + b * s[1] + row * s[2] + column * s[3]; };
        const int64_t rows = shape.size[2] - row, columns = shape.size[3] - column;
        return {at(shape.x), at(shape.group), at(shape.out),
                rows < rows_per_piece ? rows : rows_per_piece,
                columns < columns_per_piece ? columns : columns_per_piece};
    }
};

template <class Do> void for_all(const Work& work, int threads, Do&& act) {
    if (work.shape.elements() < SERIAL) threads = 1;
    #pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int thread = 0; thread < threads; ++thread) {
        const int64_t end = work.count * (thread + 1) / threads;
        for (int64_t i = work.count * thread / threads; i < end; ++i) act(work.piece(i), thread);
    }
}

// The grid of LANES elements, from four numbers on: the same for all, or entry by entry.
struct Lanes {
    Vec scale, offset, low, high;
    bool shifted;
    Lanes(const Numbers* own, int64_t at) :
        scale(splat(own[0].at(at))), offset(splat(own[1].values ? own[1].at(at) : 0.0f)), low(splat(own[2].at(at))),
        high(splat(own[3].at(at))), shifted(own[1].values != nullptr) {}
    Lanes(const Numbers* own, int64_t at, int64_t count) :
        scale(own[0].lanes(at, count)), offset(own[1].values ? own[1].lanes(at, count) : Vec{}), low(own[2].lanes(at, count)),
        high(own[3].lanes(at, count)), shifted(own[1].values != nullptr) {}
    Vec steps(Vec x) const { return (shifted ? x - offset : x) / scale; }
    Vec value(Vec q) const { return shifted ? q * scale + offset : q * scale; }
    Vec code(Vec x) const { return round_even(clamp(steps(x), low, high)); }
    Vec on_grid(Vec x) const { return value(code(x)); }
};

// Two grids, such as those of neighbouring widths, and the share of the second one.
struct Pair {
    Lanes lower, upper;
    Vec share;
    Pair(const Numbers* own, int64_t at) : lower(own, at), upper(own + 4, at), share(splat(own[8].at(at))) {}
    Pair(const Numbers* own, int64_t at, int64_t n) :
        lower(own, at, n), upper(own + 4, at, n), share(own[8].lanes(at, n)) {}
    Vec on_grid(Vec x) const {
        const Vec low = lower.on_grid(x);
        return low + share * (upper.on_grid(x) - low);
    }
};

// Writes what `act` makes of the grid, as `Own`, and the values of LANES elements. Where groups differ along rows, the
// grid's numbers are loaded once for all rows of a piece.
template <class Own, class X, class O, class Act>
void map(const X* x, O* out, const Grids& grids, const Shape& shape, int threads, const Act& act) {
    const bool tiled = shape.group[3] == 0;
    for_all(Work(shape), threads, [&](const Piece& p, int) {
        const int64_t x_row = shape.x[2], out_row = shape.out[2];
        const X* from = x + p.x;
        O* to = out + p.out;
        if (tiled) {
            const Own own(grids.numbers, p.group);
            for (int64_t r = 0; r < p.rows; ++r, from += x_row, to += out_row) {
                int64_t i = 0;
                for (; i + LANES <= p.columns; i += LANES) store(to + i, act(own, load(from + i, LANES)), LANES);
                if (i < p.columns) store(to + i, act(own, load(from + i, p.columns - i)), p.columns - i);
            }
        } else {
            for (int64_t i = 0; i < p.columns; i += LANES) {
                const int64_t n = p.columns - i;
                const Own own(grids.numbers, p.group + i, n);
                for (int64_t r = 0; r < p.rows; ++r)
                    store(to + r * out_row + i, act(own, load(from + r * x_row + i, n)), n);
            }
        }
    });
}

template <class X, class O>
void forward(const X* x, O* out, const Grids& grids, const Shape& shape, int threads) {
    const auto act = [](const auto& own, Vec value) { return own.on_grid(value); };
    if (grids.are_two()) map<Pair>(x, out, grids, shape, threads, act);
    else map<Lanes>(x, out, grids, shape, threads, act);
}

// N sums of one group while a tile is worked on: SUMS parts of each, added up in the order of their lanes.
template <int N> struct Tile {
    Vec parts[PARTS][N] = {};
    void add(int part, const Vec* found) {
        for (int s = 0; s < N; ++s) parts[part][s] += found[s];
    }
    float total(int which) const {
        float sum = 0;
        for (int part = 0; part < PARTS; ++part)
            for (int i = 0; i < LANES; ++i) sum += parts[part][which][i];
        return sum;
    }
};

// N sums for each of LANES groups.
template <int N> struct Column {
    double sums[N][LANES] = {};
    void add(const Vec* found) {
        float values[N][LANES];
        std::memcpy(values, found, sizeof values);
        for (int s = 0; s < N; ++s)
            for (int i = 0; i < LANES; ++i) sums[s][i] += values[s][i];
    }
};

// Sums of N numbers per element over the elements of each group. `act` gets the grid of LANES elements, as `Own`, with
// their values and gradients, where to write, and the count; it fills in the N numbers.
template <int N, class Own, class X, class G, class Act>
void sum_up(const G* grad, const X* x, float* sums, const Grids& grids, const Shape& shape,
            const int64_t* grad_strides, int64_t groups, int threads, const Act& act) {
    if (shape.elements() < SERIAL) threads = 1;
    std::vector<double> partial(threads * N * groups, 0.0);
    const bool tiled = shape.group[3] == 0;
    // Offsets of the gradient's elements are found by a second list of pieces, cut alike.
    Shape other = shape;
    std::memcpy(other.x, grad_strides, sizeof other.x);
    const Work work(shape), of_grad(other);
    #pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int thread = 0; thread < threads; ++thread) {
        double* own_sums = partial.data() + thread * N * groups;
        const int64_t end = work.count * (thread + 1) / threads;
        for (int64_t k = work.count * thread / threads; k < end; ++k) {
            const Piece p = work.piece(k);
            const int64_t x_row = shape.x[2], g_row = grad_strides[2], out_row = shape.out[2];
            const X* from = x + p.x;
            const G* g_from = grad + of_grad.piece(k).x;
            int64_t to = p.out;
            Vec found[N];
            if (tiled) {
                const Own own(grids.numbers, p.group);
                Tile<N> tile;
                for (int64_t r = 0; r < p.rows; ++r, from += x_row, g_from += g_row, to += out_row) {
                    int64_t i = 0;
                    for (; i + SUMS <= p.columns; i += SUMS) {
                        #pragma GCC unroll 4
                        for (int part = 0; part < PARTS; ++part) {
                            const int64_t at = i + part * LANES;
                            act(own, load(from + at, LANES), load(g_from + at, LANES), to + at, LANES, found);
                            tile.add(part, found);
                        }
                    }
                    // Lanes beyond the end have no gradient, but 0/scale may be NaN for a scale that is.
                    for (int part = 0; i < p.columns; ++part, i += LANES) {
                        const int64_t n = p.columns - i;
                        act(own, load(from + i, n), load(g_from + i, n), to + i, n, found);
                        tile.add(part, found);
                    }
                }
                for (int s = 0; s < N; ++s) own_sums[s * groups + p.group] += tile.total(s);
            } else {
                for (int64_t i = 0; i < p.columns; i += LANES) {
                    const int64_t n = p.columns - i, group = p.group + i;
                    const Own own(grids.numbers, group, n);
                    Column<N> column;
                    for (int64_t r = 0; r < p.rows; ++r) {
                        const int64_t at = to + r * out_row + i;
                        act(own, load(from + r * x_row + i, n), load(g_from + r * g_row + i, n), at, n, found);
                        column.add(found);
                    }
                    for (int s = 0; s < N; ++s)
                        for (int64_t j = 0; j < (n < LANES ? n : LANES); ++j)
                            own_sums[s * groups + group + j] += column.sums[s][j];
                }
            }
        }
    }
    for (int64_t i = 0; i < N * groups; ++i) {
        double sum = 0;
        for (int thread = 0; thread < threads; ++thread) sum += partial[thread * N * groups + i];
        sums[i] = (float)sum;
    }
}

// What of a gradient passes through a grid; and sum g*(q - c), sum g'*c, sum g', with g' = g where u != c.
inline Vec through(const Lanes& own, Vec value, Vec g, Vec* found) {
    const Vec u = own.steps(value), c = clamp(u, own.low, own.high), cut = u != c ? g : Vec{};
    found[0] = (round_even(c) - c) * g;
    found[1] = cut * c;
    found[2] = cut;
    return g - cut;
}

// On one grid: grad_x, and for each group the three sums. On two: grad_x, three sums of each by its share, and
// sum g*(x^ above - x^ below), or that alone. `count` says which: 3, 7 or 1 sums.
template <class X, class G>
void backward(const G* grad, const X* x, X* grad_x, float* sums, int count, const Grids& grids, const Shape& shape,
              const int64_t* grad_strides, int64_t groups, int threads) {
    if (count == 3)
        sum_up<3, Lanes>(grad, x, sums, grids, shape, grad_strides, groups, threads,
            [&](const Lanes& own, Vec value, Vec g, int64_t to, int64_t n, Vec* found) {
                store(grad_x + to, through(own, value, g, found), n);
            });
    else if (count == 7)
        sum_up<7, Pair>(grad, x, sums, grids, shape, grad_strides, groups, threads,
            [&](const Pair& own, Vec value, Vec g, int64_t to, int64_t n, Vec* found) {
                const Vec passed = through(own.lower, value, g * (splat(1.0f) - own.share), found);
                store(grad_x + to, passed + through(own.upper, value, g * own.share, found + 3), n);
                found[6] = g * (own.upper.on_grid(value) - own.lower.on_grid(value));
            });
    else
        sum_up<1, Pair>(grad, x, sums, grids, shape, grad_strides, groups, threads,
            [&](const Pair& own, Vec value, Vec g, int64_t, int64_t, Vec* found) {
                found[0] = g * (own.upper.on_grid(value) - own.lower.on_grid(value));
            });
}

template <class Act> void typed(const void* data, int type, const Act& act) {
    if (type == 0) act((const float*)data);
    else act((const BFloat16*)data);
}

}  // namespace

// Element types: 0 float, 1 bfloat16; of an output also 2, integers less `zero`.
extern "C" {

int qvit_forward(const void* x, int x_type, void* out, int out_type, const float* const* numbers, int single,
                 const int64_t* shape_numbers, float zero, int threads) {
    Shape shape;
    std::memcpy(&shape, shape_numbers, sizeof shape);
    const Grids grids(numbers, single);
    typed(x, x_type, [&](const auto* from) {
        if (out_type == 0) forward(from, (float*)out, grids, shape, threads);
        else if (out_type == 1) forward(from, (BFloat16*)out, grids, shape, threads);
        else map<Lanes>(from, (int8_t*)out, grids, shape, threads,
                        [zero](const Lanes& own, Vec value) { return own.code(value) - zero; });
    });
    return 0;
}

int qvit_backward(const void* grad, int grad_type, const void* x, int x_type, void* grad_x, float* sums,
                  int count, const float* const* numbers, int single, const int64_t* shape_numbers,
                  const int64_t* grad_strides, int64_t groups, int threads) {
    Shape shape;
    std::memcpy(&shape, shape_numbers, sizeof shape);
    const Grids grids(numbers, single);
    typed(grad, grad_type, [&](const auto* g) {
        if (x_type == 0)
            backward(g, (const float*)x, (float*)grad_x, sums, count, grids, shape, grad_strides, groups, threads);
        else
            backward(g, (const BFloat16*)x, (BFloat16*)grad_x, sums, count, grids, shape, grad_strides, groups, threads);
    });
    return 0;
}

// out[i, j] = (sums[i, j] + more[j])*factor[j] + bias[j]
int qvit_scale_sums(const int32_t* sums, const int32_t* more, void* out, int out_type, const float* factor,
                    const float* bias, int64_t rows, int64_t columns, int threads) {
    if (rows * columns < SERIAL) threads = 1;
    #pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < columns; i += LANES) {
            const int64_t n = columns - i;
            const Ints sum = load_ints(sums + r * columns + i, n) + load_ints(more + i, n);
            const Vec value = __builtin_convertvector(sum, Vec) * load(factor + i, n) + load(bias + i, n);
            if (out_type == 0) store((float*)out + r * columns + i, value, n);
            else store((BFloat16*)out + r * columns + i, value, n);
        }
    }
    return 0;
}

}  // extern "C"
