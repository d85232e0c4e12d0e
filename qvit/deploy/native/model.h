// A Vision Transformer on integers, from images to logits. Included once per instruction set, after kernels.h, inside
// the same namespace. `deploy/integer/reference.py` has what is computed, operation by operation.
//
// Per block there are two steps, with a barrier of all threads between them:
//
//   rows     a thread keeps a range of tokens from the output projection of one block to the q|k|v projection of the
//            next: proj, residual, LayerNorm, fc1, GELU, fc2, residual, LayerNorm, qkv. Between them lie codes of a few
//            dozen tokens, in the cache; only the residual stream is in float.
//   heads    a thread takes heads of windows (or of whole images), or parts of their rows: scores, softmax, weighted
//            values, codes. Tokens of a window are found by an index, so that nothing is rolled or partitioned.
//
// Codes are stored from 0: a left operand has the byte q - low, and the sums start at low * sum(w), which makes them
// exact sums of q * w. The results do not depend on the number of threads.

// ------------------------------------------------------------------------------------------------------ float
// functions Written as plain loops over these, which compilers turn into vector instructions.

#if defined(QVIT_FMA)
inline float mad(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float nearest(float x) { return __builtin_rintf(x); }
#else
inline float mad(float a, float b, float c) { return a * b + c; }
inline float nearest(float x) { return x + 12582912.0f - 12582912.0f; }  // halves to even, for |x| < 2^22
#endif

inline float exponential(float x) {  // relative error below 2e-7 for x <= 0; 0 far below and for NaN
    const float kept = x > -87.0f ? x : -87.0f;
    const float n = nearest(kept * 1.44269504f);
    const float r = mad(n, 2.12194440e-4f, mad(n, -0.693359375f, kept));
    float p = mad(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = mad(p, r, 8.3334519073e-3f);
    p = mad(p, r, 4.1665795894e-2f);
    p = mad(p, r, 1.6666665459e-1f);
    p = mad(p, r, 5.0000001201e-1f);
    p = mad(p * r, r, r) + 1.0f;
    const int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

inline float gelu(float x) {  // x * Phi(x); Phi by a rational approximation of erf, absolute error below 4e-7
    float z = x * 0.70710678f;
    z = z < -4.0f ? -4.0f : z > 4.0f ? 4.0f : z;
    const float u = z * z;
    float p = mad(1.9213761248693118e-08f, u, -1.9899146082025254e-06f);
    p = mad(p, u, 0.00015549451927654445f);
    p = mad(p, u, 0.004291824996471405f);
    p = mad(p, u, 0.05243011564016342f);
    p = mad(p, u, 0.21391980350017548f);
    p = mad(p, u, 1.1283786296844482f);
    float q = mad(0.0010976949706673622f, u, 0.015548829920589924f);
    q = mad(q, u, 0.12078924477100372f);
    q = mad(q, u, 0.5229091644287109f);
    q = mad(q, u, 1.0f);
    return 0.5f * x * (1.0f + z * p / q);
}

inline float sigmoid(float x) {
    const float e = exponential(x > 0 ? -x : x);
    return (x > 0 ? 1.0f : e) / (1.0f + e);
}

template <Activation kind>
inline float activate(float x) {
    switch (kind) {
        case Activation::gelu: return gelu(x);
        case Activation::gelu_tanh: return x * sigmoid(1.5957691f * (x + 0.044715f * x * x * x));
        case Activation::quick_gelu: return x * sigmoid(1.702f * x);
        case Activation::silu: return x * sigmoid(x);
        case Activation::relu: return x > 0 ? x : 0;
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
    }
}

inline int32_t code_of(const Grid& grid, float x) {  // from 0; NaN becomes 0
    float u = (x - grid.offset) * grid.inverse;
    u = u > float(grid.low) ? u : float(grid.low);
    u = u < float(grid.high) ? u : float(grid.high);
    return int32_t(nearest(u)) - grid.low;
}

// Loops over rows and tiles. They are functions of their own, with numbers as values and pointers that do not overlap:
// inside a lambda that captures by reference, a byte that is stored might be part of any number, and compilers would
// read those again for each element.

inline void encode(const float* __restrict x, int n, const Grid of, uint8_t* __restrict to) {
    for (int j = 0; j < n; ++j) to[j] = uint8_t(code_of(of, x[j]));
}

template <Activation kind>
void encode_activated(const float* __restrict x, int n, const Grid of, uint8_t* __restrict to) {
    for (int j = 0; j < n; ++j) to[j] = uint8_t(code_of(of, activate<kind>(x[j])));
}

// An activation and its grid as a sum of steps, for grids of few levels: fewer operations than the function, and the
// fewer the narrower. The functions fall to one lowest point and rise behind it; code = base + how many `rises` are at
// or below x + how many `falls` are at or above it.
struct Steps {
    static constexpr int kRises = 8, kFalls = 2;
    bool there = false;
    int base = 0, rises = 0;
    float rise[kRises], fall[kFalls];
};

template <Activation kind>
Steps steps_of(const Grid& grid) {
    Steps steps;
    if (grid.high - grid.low >= Steps::kRises) return steps;
    auto code = [&](float x) {
        return code_of(grid, activate<kind>(x));
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
    std::fill_n(steps.rise, Steps::kRises, std::numeric_limits<float>::infinity());
    std::fill_n(steps.fall, Steps::kFalls, -std::numeric_limits<float>::infinity());
    constexpr float kFar = 1e30f;
    steps.base = code(bottom);
    for (int wanted = steps.base + 1; wanted <= code(kFar); ++wanted)
        steps.rise[steps.rises++] = first(bottom, kFar, wanted);
    const int falls = code(-100.0f) - steps.base;
    if (falls > Steps::kFalls) return steps;
    for (int i = 0; i < falls; ++i) steps.fall[i] = first(bottom, -100.0f, steps.base + 1 + i);
    steps.there = true;
    return steps;
}

template <int rises>
void encode_steps(const float* __restrict x, int n, const Steps steps, uint8_t* __restrict to) {
    for (int j = 0; j < n; ++j) {
        const float value = x[j];
        int32_t code = steps.base;
#pragma GCC unroll 8
        for (int k = 0; k < rises; ++k) code += value >= steps.rise[k];
#pragma GCC unroll 2
        for (int k = 0; k < Steps::kFalls; ++k) code += value <= steps.fall[k];
        to[j] = uint8_t(code);
    }
}

inline void encode_steps(const float* x, int n, const Steps& steps, uint8_t* to) {
    if (steps.rises <= 4) return encode_steps<4>(x, n, steps, to);
    encode_steps<Steps::kRises>(x, n, steps, to);
}

// Codes by column, each with a grid of its own; `shift` is taken off.
inline void encode_columns(const float* __restrict x, int n, const float* __restrict inverse,
                           const float* __restrict offset, const float* __restrict low, const float* __restrict high,
                           const float* __restrict shift, uint8_t* __restrict to) {
    for (int j = 0; j < n; ++j) {
        float u = (x[j] - offset[j]) * inverse[j];
        u = u > low[j] ? u : low[j];
        u = u < high[j] ? u : high[j];
        to[j] = uint8_t(int32_t(nearest(u) - shift[j]));
    }
}

// A row of a tile of sums, with a scale and an addend by column.
inline void scale_row(const int32_t* __restrict sums, const float* __restrict scale, const float* __restrict add,
                      float* __restrict to) {
    for (int j = 0; j < kColumns; ++j) to[j] = float(sums[j]) * scale[j] + add[j];
}
inline void add_scaled_row(const int32_t* __restrict sums, const float* __restrict scale, float* __restrict to) {
    for (int j = 0; j < kColumns; ++j) to[j] += float(sums[j]) * scale[j];
}
// With one scale for all columns.
inline void add_scaled_row(const int32_t* __restrict sums, float scale, float* __restrict to) {
    for (int j = 0; j < kColumns; ++j) to[j] += float(sums[j]) * scale;
}
inline void scale_row(const int32_t* __restrict sums, float scale, const float* __restrict add, float* __restrict to) {
    for (int j = 0; j < kColumns; ++j) to[j] = float(sums[j]) * scale + add[j];
}
inline void add_number(float number, float* to) {
    for (int j = 0; j < kColumns; ++j) to[j] += number;
}
inline void add_row(const float* __restrict x, int n, float* __restrict to) {
    for (int j = 0; j < n; ++j) to[j] += x[j];
}

// Sixteen maxima, each of every sixteenth number of a row of a tile.
inline void greatest_of(const float* __restrict x, float* __restrict most) {
    static_assert(kColumns == 16 || kColumns == 32);
    for (int t = 0; t < 16; ++t) {
        const float a = x[t], b = x[t + kColumns - 16], greater = a > b ? a : b;
        most[t] = greater > most[t] ? greater : most[t];
    }
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

// exp(x - most) in place, and sums of multiples of 16 numbers. Not inlined: inside `attend` GCC 12 leaves loops scalar.
__attribute__((noinline)) inline void exponentials(float* __restrict x, int n, float most) {
    for (int j = 0; j < n; ++j) x[j] = exponential(x[j] - most);
}
inline float sum_of(const float* __restrict x, int n) {
    float lane[16] = {}, total = 0;
    for (int j = 0; j < n; j += 16)
        for (int t = 0; t < 16; ++t) lane[t] += x[j + t];
    for (float value : lane) total += value;
    return total;
}

// Levels 2^(-q / steps), the last of them 0, as two operands of powers of two: even and odd codes (log-sqrt2), or the
// eight largest levels and the others (log2). q comes from the exponent x - most, not from the exponential.
inline void log_levels(const float* __restrict x, int n, float most, float level_of_one, int log_steps, float highest,
                       uint8_t* __restrict first, uint8_t* __restrict second) {
    const int half = log_steps == 2 ? 1 : 8, shift = log_steps == 2 ? 1 : 0;
    const float steps = float(log_steps);
    for (int j = 0; j < n; ++j) {
        float q = steps * (level_of_one - (x[j] - most) * 1.44269504f);
        q = q > 0 ? q : 0;
        q = nearest(q < highest ? q : highest);
        const int32_t code = int32_t(q), level = q < highest ? 128 >> ((code >> shift) & 7) : 0;
        first[j] = uint8_t(code & half ? 0 : level);
        second[j] = uint8_t(code & half ? level : 0);
    }
}

struct Norm {
    bool there = false, centred = true;
    float epsilon = 0;
    Buffer<float> weight, bias;

    Norm() = default;
    explicit Norm(const NormNumbers& from) : there(from.there), centred(from.centred), epsilon(from.epsilon) {
        weight.assign(from.weight.begin(), from.weight.end());
        bias.assign(from.bias.begin(), from.bias.end());
    }
    // `first`: where in weight and bias the n channels begin.
    void operator()(const float* x, float* to, int n, int first = 0) const {
        // Sums by lane: the order does not depend on how wide a vector is.
        float lane[16] = {}, mean = 0, variance = 0;
        int j = 0;
        if (centred) {
            for (; j + 16 <= n; j += 16)
                for (int t = 0; t < 16; ++t) lane[t] += x[j + t];
            for (; j < n; ++j) mean += x[j];
            for (int t = 0; t < 16; ++t) mean += lane[t], lane[t] = 0;
            mean /= float(n);
        }
        for (j = 0; j + 16 <= n; j += 16)
            for (int t = 0; t < 16; ++t) {
                const float d = x[j + t] - mean;
                lane[t] += d * d;
            }
        for (; j < n; ++j) variance += (x[j] - mean) * (x[j] - mean);
        for (int t = 0; t < 16; ++t) variance += lane[t];
        const float factor = 1.0f / std::sqrt(variance / float(n) + epsilon);
        const float *by = weight.data() + first, *add = bias.data() + first;
        for (j = 0; j < n; ++j) to[j] = (x[j] - mean) * factor * by[j] + add[j];
    }
};

struct Linear {
    int n = 0, k = 0, segments = 1, padded = 0;
    std::vector<Grid> grid;
    std::vector<Panels> panels;  // one per segment of k
    Buffer<float> scale, bias;   // scale: (segments, padded)
    // Of rows of prefix tokens, where their grid is another one.
    bool splits = false;
    Grid prefix_grid;
    Buffer<float> prefix_scale, prefix_bias;

    Linear() = default;
    explicit Linear(const LayerNumbers& from) : n(from.n), k(from.k), segments(from.segments), grid(from.grid) {
        padded = round_up(n, kColumns);
        bias.assign(size_t(padded), 0);
        std::copy(from.bias.begin(), from.bias.end(), bias.begin());
        scale.assign(size_t(segments) * padded, 0);
        panels.resize(size_t(segments));
        const int part = segments ? k / segments : 0;
        for (int s = 0; s < segments; ++s) {
            std::copy_n(from.scale.data() + size_t(s) * n, n, scale.data() + size_t(s) * padded);
            const int most = fill_panels(panels[s], n, part, from.codes.data() + s * part, k);
            panels[s].begin(panels[s].left, grid[s].low, grid[s].high - grid[s].low, most);
            if (from.splits)
                panels[s].begin(panels[s].prefix, from.prefix_grid.low, from.prefix_grid.high - from.prefix_grid.low,
                                most);
        }
        if (!from.splits) return;
        splits = true, prefix_grid = from.prefix_grid;
        prefix_scale.assign(size_t(padded), 0), prefix_bias.assign(size_t(padded), 0);
        std::copy(from.prefix_scale.begin(), from.prefix_scale.end(), prefix_scale.begin());
        std::copy(from.prefix_bias.begin(), from.prefix_bias.end(), prefix_bias.begin());
    }
    const Grid& grid_of(bool early) const { return early && splits ? prefix_grid : grid[0]; }
};

// Per column of qkv: how its output becomes codes.
struct Columns {
    Buffer<float> inverse, offset, low, high, shift;

    Columns() = default;
    Columns(const std::vector<HeadNumbers>& heads, int dim, bool early) {
        const int each = dim / int(heads.size()), columns = round_up(3 * dim, kColumns);
        for (Buffer<float>* numbers : {&inverse, &offset, &low, &high, &shift}) numbers->assign(size_t(columns), 0);
        for (int h = 0; h < int(heads.size()); ++h) {
            const HeadNumbers& head = heads[size_t(h)];
            const Grid* parts[] = {early ? &head.prefix_query : &head.query, early ? &head.prefix_key : &head.key,
                                   early ? &head.prefix_value : &head.value};
            for (int p = 0; p < 3; ++p)
                for (int t = 0; t < each; ++t) {
                    const size_t c = size_t(p * dim + h * each + t);
                    inverse[c] = parts[p]->inverse, offset[c] = parts[p]->offset;
                    low[c] = float(parts[p]->low), high[c] = float(parts[p]->high);
                    shift[c] = p == 0 ? float(parts[p]->low) : 0.0f;
                }
        }
    }
};

struct Block {
    Norm norm1, norm2, mlp_norm, query_norm, key_norm;
    Linear qkv, proj, fc1, gate, fc2;
    std::vector<HeadNumbers> heads;
    int log_steps = 0;
    bool splits_queries, splits_keys, splits_values;
    Columns columns, prefix_columns;  // of all tokens, or but for prefix tokens; and of these
    Buffer<float> position_bias;      // (heads, area, columns of scores); or none
    Steps steps;                      // from outputs of fc1 to inputs of fc2

    Block(const BlockNumbers& from, const StageNumbers& stage, Activation activation)
        : norm1(from.norm1),
          norm2(from.norm2),
          mlp_norm(from.mlp_norm),
          query_norm(from.query_norm),
          key_norm(from.key_norm),
          qkv(from.qkv),
          proj(from.proj),
          fc1(from.fc1),
          gate(from.gate),
          fc2(from.fc2),
          heads(from.heads),
          log_steps(from.log_steps),
          splits_queries(from.splits_queries),
          splits_keys(from.splits_keys),
          splits_values(from.splits_values),
          columns(heads, stage.dim, false) {
        if (splits_queries || splits_keys || splits_values) prefix_columns = Columns(heads, stage.dim, true);
        with_activation(activation, [&](auto kind) { steps = steps_of<decltype(kind)::value>(fc2.grid[0]); });
        if (from.position_bias.empty()) return;
        const int area = stage.window_y * stage.window_x, wide = round_up(area, kColumns);
        position_bias.assign(size_t(stage.heads) * area * wide, 0);
        for (int i = 0; i < stage.heads * area; ++i)
            std::copy_n(from.position_bias.data() + size_t(i) * area, area, position_bias.data() + size_t(i) * wide);
    }
};

struct Stage {
    int dim, heads, each, hidden, rows, columns, tokens;
    int windows = 1, area;  // of an image; tokens of a window
    float factor;           // of the scores
    Norm merge_norm;
    Linear merge;
    std::vector<Block> blocks;
    // For windows, without a shift and with it: the token at each place, and regions that do not attend to one another.
    std::vector<int> place[2];
    Buffer<float> region;     // (windows, columns of scores), of shifted windows
    std::vector<char> mixed;  // windows that hold several regions

    Stage(const StageNumbers& from, int prefix, Activation activation)
        : dim(from.dim),
          heads(from.heads),
          each(dim / heads),
          hidden(from.hidden),
          rows(from.rows),
          columns(from.columns),
          tokens(rows * columns + prefix),
          area(tokens),
          factor(1.0f / std::sqrt(float(each))),
          merge_norm(from.merge_norm),
          merge(from.merge) {
        for (const BlockNumbers& block : from.blocks) blocks.emplace_back(block, from, activation);
        if (!from.window_y) return;
        area = from.window_y * from.window_x, windows = tokens / area;
        const int across = columns / from.window_x, wide = round_up(area, kColumns);
        region.assign(size_t(windows) * wide, 0), mixed.assign(size_t(windows), 0);
        // A shift rolls the image; its last window along an axis then holds two ends of it.
        auto part = [](int at, int length, int window, int shift) {
            return !shift ? 2 : at < length - window ? 0 : at < length - shift ? 1 : 2;
        };
        for (int shifted = 0; shifted < 2; ++shifted) {
            const int dy = shifted ? from.shift_y : 0, dx = shifted ? from.shift_x : 0;
            place[shifted].resize(size_t(tokens));
            for (int w = 0; w < windows; ++w)
                for (int t = 0; t < area; ++t) {
                    const int y = w / across * from.window_y + t / from.window_x,
                              x = w % across * from.window_x + t % from.window_x;
                    place[shifted][size_t(w) * area + t] = (y + dy) % rows * columns + (x + dx) % columns;
                    if (!shifted || !(dy || dx)) continue;
                    float* own = region.data() + size_t(w) * wide;
                    own[t] = float(3 * part(y, rows, from.window_y, dy) + part(x, columns, from.window_x, dx));
                    if (own[t] != own[0]) mixed[size_t(w)] = 1;
                }
        }
    }
};

struct Scratch {
    Buffer<uint8_t> codes, second_codes, hidden, probs, second, queries;
    Buffer<float> rows, scores, exponentials, projected, wide;
    Panels keys, values, prefix_values;
    Buffer<float> key_add, key_scale;
    double seconds[kKinds] = {};
};

// Adds the time until it ends to a kind of kernel; nothing where nobody asks for a profile.
class Watch {
  public:
    Watch(bool on, double& to) : to_(on ? &to : nullptr) {
        if (to_) begin_ = std::chrono::steady_clock::now();
    }
    ~Watch() {
        if (to_) *to_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
    }

  private:
    double* to_;
    std::chrono::steady_clock::time_point begin_;
};

class Model final : public Runner {
  public:
    Model(const Network& from, int threads)
        : channels(from.channels),
          side_y(from.side_y),
          side_x(from.side_x),
          patch_y(from.patch_y),
          patch_x(from.patch_x),
          prefix(from.prefix),
          classes(from.classes),
          pool(from.pool),
          activation(from.activation),
          mlp(from.mlp),
          embed(from.embed),
          head(from.head),
          patch_norm(from.patch_norm),
          first_norm(from.first_norm),
          norm(from.norm),
          head_norm(from.head_norm),
          threads_(threads) {
        added.assign(from.added.begin(), from.added.end());
        for (const StageNumbers& stage : from.stages) stages.emplace_back(stage, prefix, activation);
        for (const Stage& stage : stages)
            most_channels = std::max(most_channels, std::max(stage.hidden, 4 * stage.dim));
        team = std::make_unique<Team>(threads);
        scratch.resize(size_t(threads));
    }

    // After a fork the threads are not there.
    void after_fork() override {
        (void)team.release();
        team = std::make_unique<Team>(threads_);
    }
    void run(const float* images, int batch, float* logits) override { forward(images, batch, logits); }
    void profile(const float* images, int batch, float* logits, double* seconds) override {
        watching = true;
        for (Scratch& own : scratch) std::fill_n(own.seconds, kKinds, 0.0);
        forward(images, batch, logits);
        watching = false;
        for (int kind = 0; kind < kKinds; ++kind) {
            seconds[kind] = 0;
            for (const Scratch& own : scratch) seconds[kind] += own.seconds[kind] / double(scratch.size());
        }
    }

  private:
    static constexpr int kChunk = 36;

    int channels, side_y, side_x, patch_y, patch_x, prefix, classes, pool, most_channels = 0;
    Activation activation;
    Mlp mlp;
    Linear embed, head;
    Norm patch_norm, first_norm, norm, head_norm;
    Buffer<float> added;
    std::vector<Stage> stages;
    int threads_;
    std::unique_ptr<Team> team;
    std::vector<Scratch> scratch;
    Buffer<float> stream, other;  // (B * tokens, dim): of this stage, and of the one before or after
    Buffer<uint8_t> qkv;          // (B * tokens, 3 * dim)
    Buffer<uint8_t> merged;       // (B * tokens, dim)
    bool watching = false;

    template <class Use>
    static void linear(const Linear& layer, int m, const uint8_t* a, int64_t lda, Use&& use, bool early = false);
    template <class Use>
    void linear_of_tokens(const Stage& stage, const Linear& layer, int first, int count, const uint8_t* a, int64_t lda,
                          Use&& use);
    bool is_early(const Stage& stage, int row) const { return row % stage.tokens < prefix; }
    void forward(const float* images, int batch, float* logits);
    void embed_patches(const Stage& stage, const float* images, int first, int last, Scratch& own);
    void merge_tokens(const Stage& before, const Stage& stage, const float* from, int first, int last, Scratch& own);
    void project_qkv(const Stage& stage, const Block& block, int first, int last, Scratch& own);
    void store_qkv(const Stage& stage, const Block& block, int token, int column, int columns, const float* values);
    void finish_block(const Stage& stage, const Block& block, int first, int last, Scratch& own);
    void hidden_codes(const Stage& stage, const Block& block, int first, int count, Scratch& own);
    void attend(const Stage& stage, const Block& block, bool shifted, int image, int window, int head, int first,
                int last, Scratch& own);
    void classify(const Stage& stage, int image, float* logits, Scratch& own);
};

// The outputs of a layer for m rows, tile after tile in float: `use(row, rows, column, columns, values, stride)`.
// `early`: they are of prefix tokens.
template <class Use>
void Model::linear(const Linear& layer, int m, const uint8_t* a, int64_t lda, Use&& use, bool early) {
    alignas(64) float values[kRows * kColumns];
    if (layer.segments == 1) {
        const bool own = early && layer.splits;
        const float* scale = (own ? layer.prefix_scale : layer.scale).data();
        const float* bias = (own ? layer.prefix_bias : layer.bias).data();
        const Panels& panels = layer.panels[0];
        multiply(m, a, lda, panels, own ? panels.prefix : panels.left,
                 [&](int row, int rows, int column, int columns, const int32_t* sums) {
                     for (int i = 0; i < rows; ++i)
                         scale_row(sums + i * kColumns, scale + column, bias + column, values + i * kColumns);
                     use(row, rows, column, columns, values, kColumns);
                 });
        return;
    }
    // Tile by tile, the segments' sums with their scales.
    const int n = layer.padded, k = layer.k / layer.segments;
    alignas(64) int32_t sums[kRows * kColumns];
    const int step = even(m, kRows);
    for (int column = 0; column < layer.n; column += kColumns)
        for (int row = 0; row < m; row += step) {
            const int rows = std::min(step, m - row);
            for (int i = 0; i < rows; ++i) std::copy_n(layer.bias.data() + column, kColumns, values + i * kColumns);
            for (int s = 0; s < layer.segments; ++s) {
                const Panels& panels = layer.panels[size_t(s)];
                multiply_tile(rows, a + row * lda + s * k, lda, panels, panels.left, column, sums);
                for (int i = 0; i < rows; ++i)
                    add_scaled_row(sums + i * kColumns, layer.scale.data() + size_t(s) * n + column,
                                   values + i * kColumns);
            }
            use(row, rows, column, std::min(kColumns, layer.n - column), values, kColumns);
        }
}

// The same for `count` rows of the stream from `first` on: prefix tokens and others are multiplied apart where their
// grids differ.
template <class Use>
void Model::linear_of_tokens(const Stage& stage, const Linear& layer, int first, int count, const uint8_t* a,
                             int64_t lda, Use&& use) {
    if (!layer.splits) return linear(layer, count, a, lda, use);
    for (int begin = 0, end; begin < count; begin = end) {
        const int token = (first + begin) % stage.tokens;
        const bool early = token < prefix;
        end = std::min(count, begin + (early ? prefix : stage.tokens) - token);
        linear(
            layer, end - begin, a + size_t(begin) * lda, lda,
            [&](int row, int rows, int column, int columns, const float* values, int stride) {
                use(begin + row, rows, column, columns, values, stride);
            },
            early);
    }
}

void Model::embed_patches(const Stage& stage, const float* images, int first, int last, Scratch& own) {
    Watch watch(watching, own.seconds[kEmbedding]);
    const int across = stage.columns, patches = stage.rows * stage.columns, dim = stage.dim, lda = round_up(embed.k, 4);
    const Grid grid = embed.grid[0];
    for (int begin = first; begin < last; begin += kChunk) {
        const int end = std::min(last, begin + kChunk);
        own.hidden.assign(size_t(kChunk) * lda, 0);
        for (int p = begin; p < end; ++p) {
            const float* image = images + size_t(p / patches) * channels * side_y * side_x;
            const int place = p % patches, top = place / across * patch_y, left = place % across * patch_x;
            uint8_t* to = own.hidden.data() + size_t(p - begin) * lda;
            for (int c = 0; c < channels; ++c)
                for (int y = 0; y < patch_y; ++y, to += patch_x)
                    encode(image + (size_t(c) * side_y + top + y) * side_x + left, patch_x, grid, to);
        }
        auto row_of = [&](int p) {
            return stream.data() + (size_t(p / patches) * stage.tokens + prefix + p % patches) * dim;
        };
        linear(embed, end - begin, own.hidden.data(), lda,
               [&](int row, int rows, int column, int columns, const float* values, int stride) {
                   for (int i = 0; i < rows; ++i)
                       std::copy_n(values + i * stride, columns, row_of(begin + row + i) + column);
               });
        own.rows.resize(size_t(most_channels));
        for (int p = begin; p < end; ++p) {
            float* row = row_of(p);
            if (patch_norm.there) {
                patch_norm(row, own.rows.data(), dim);
                std::copy_n(own.rows.data(), dim, row);
            }
            if (!added.empty()) add_row(added.data() + size_t(prefix + p % patches) * dim, dim, row);
        }
    }
}

// Four tokens of the stage before become one: rows from `first` to `last` of the stream.
void Model::merge_tokens(const Stage& before, const Stage& stage, const float* from, int first, int last,
                         Scratch& own) {
    Watch watch(watching, own.seconds[kMerging]);
    const int dim = before.dim, k = 4 * dim, lda = round_up(k, 4);
    for (int begin = first; begin < last; begin += kChunk) {
        const int end = std::min(last, begin + kChunk);
        own.hidden.resize(size_t(kChunk) * lda);
        own.rows.resize(size_t(k)), own.wide.resize(size_t(k));
        for (int p = begin; p < end; ++p) {
            const int place = p % stage.tokens, y = place / stage.columns * 2, x = place % stage.columns * 2;
            const float* image = from + size_t(p / stage.tokens) * before.tokens * dim;
            for (int part = 0; part < 4; ++part)  // down, then right
                std::copy_n(image + size_t((y + part % 2) * before.columns + x + part / 2) * dim, dim,
                            own.wide.data() + part * dim);
            const float* row = own.wide.data();
            if (stage.merge_norm.there) stage.merge_norm(row, own.rows.data(), k), row = own.rows.data();
            encode(row, k, stage.merge.grid[0], own.hidden.data() + size_t(p - begin) * lda);
        }
        linear(stage.merge, end - begin, own.hidden.data(), lda,
               [&](int row, int rows, int column, int columns, const float* values, int stride) {
                   for (int i = 0; i < rows; ++i)
                       std::copy_n(values + i * stride, columns,
                                   stream.data() + size_t(begin + row + i) * stage.dim + column);
               });
    }
}

void Model::project_qkv(const Stage& stage, const Block& block, int first, int last, Scratch& own) {
    const int dim = stage.dim, lda = round_up(dim, 4), count = last - first;
    own.codes.resize(size_t(count) * lda);
    own.rows.resize(size_t(most_channels));
    {
        Watch watch(watching, own.seconds[kNorm]);
        for (int i = 0; i < count; ++i) {
            const float* row = stream.data() + size_t(first + i) * dim;
            if (block.norm1.there) block.norm1(row, own.rows.data(), dim), row = own.rows.data();
            encode(row, dim, block.qkv.grid_of(is_early(stage, first + i)), own.codes.data() + size_t(i) * lda);
        }
    }
    Watch watch(watching, own.seconds[kQkv]);
    if (!block.query_norm.there && !block.key_norm.there) {
        linear_of_tokens(stage, block.qkv, first, count, own.codes.data(), lda,
                         [&](int row, int rows, int column, int columns, const float* values, int stride) {
                             for (int i = 0; i < rows; ++i)
                                 store_qkv(stage, block, first + row + i, column, columns, values + i * stride);
                         });
        return;
    }
    own.projected.resize(size_t(count) * 3 * dim);
    linear_of_tokens(stage, block.qkv, first, count, own.codes.data(), lda,
                     [&](int row, int rows, int column, int columns, const float* values, int stride) {
                         for (int i = 0; i < rows; ++i)
                             std::copy_n(values + i * stride, columns,
                                         own.projected.data() + size_t(row + i) * 3 * dim + column);
                     });
    for (int i = 0; i < count; ++i) {
        float* row = own.projected.data() + size_t(i) * 3 * dim;
        for (const Norm* norm : {&block.query_norm, &block.key_norm}) {
            float* part = row + (norm == &block.key_norm ? dim : 0);
            for (int h = 0; norm->there && h < stage.heads; ++h) {
                (*norm)(part + h * stage.each, own.rows.data(), stage.each, h * stage.each);
                std::copy_n(own.rows.data(), stage.each, part + h * stage.each);
            }
        }
        store_qkv(stage, block, first + i, 0, 3 * dim, row);
    }
}

// Codes of a token's outputs of qkv, from a column on: queries from 0 on, keys and values as they are.
void Model::store_qkv(const Stage& stage, const Block& block, int token, int column, int columns, const float* values) {
    const bool early = !block.prefix_columns.inverse.empty() && is_early(stage, token);
    const Columns& own = early ? block.prefix_columns : block.columns;
    encode_columns(values, columns, own.inverse.data() + column, own.offset.data() + column, own.low.data() + column,
                   own.high.data() + column, own.shift.data() + column,
                   qkv.data() + size_t(token) * 3 * stage.dim + column);
}

void Model::finish_block(const Stage& stage, const Block& block, int first, int last, Scratch& own) {
    const int dim = stage.dim, wide = round_up(stage.hidden, 4), count = last - first;
    auto add_to_stream = [&](int row, int rows, int column, int columns, const float* values, int stride) {
        for (int i = 0; i < rows; ++i)
            add_row(values + i * stride, columns, stream.data() + size_t(first + row + i) * dim + column);
    };
    {
        Watch watch(watching, own.seconds[kProj]);
        linear(block.proj, count, merged.data() + size_t(first) * dim, dim, add_to_stream);
    }
    hidden_codes(stage, block, first, count, own);
    Watch watch(watching, own.seconds[kSecond]);
    linear_of_tokens(stage, block.fc2, first, count, own.hidden.data(), wide, add_to_stream);
}

// The inputs of fc2 for rows of the stream, from the second norm on.
void Model::hidden_codes(const Stage& stage, const Block& block, int first, int count, Scratch& own) {
    const int dim = stage.dim, hidden = stage.hidden, lda = round_up(dim, 4), wide = round_up(hidden, 4);
    own.codes.resize(size_t(count) * lda);
    own.rows.resize(size_t(most_channels));
    own.hidden.resize(size_t(count) * wide);
    const bool gated = mlp == Mlp::swiglu;
    if (gated) own.second_codes.resize(size_t(count) * lda);
    {
        Watch watch(watching, own.seconds[kNorm]);
        for (int i = 0; i < count; ++i) {
            const float* row = stream.data() + size_t(first + i) * dim;
            if (block.norm2.there) block.norm2(row, own.rows.data(), dim), row = own.rows.data();
            const bool early = is_early(stage, first + i);
            encode(row, dim, block.fc1.grid_of(early), own.codes.data() + size_t(i) * lda);
            if (gated) encode(row, dim, block.gate.grid_of(early), own.second_codes.data() + size_t(i) * lda);
        }
    }
    Watch watch(watching, own.seconds[kFirst]);
    const bool plain = mlp == Mlp::plain && !block.mlp_norm.there, apart = block.fc2.splits;
    if (plain) {
        with_activation(activation, [&](auto kind) {
            linear_of_tokens(stage, block.fc1, first, count, own.codes.data(), lda,
                             [&](int row, int rows, int column, int columns, const float* values, int stride) {
                                 for (int i = 0; i < rows; ++i) {
                                     const float* from = values + i * stride;
                                     uint8_t* to = own.hidden.data() + size_t(row + i) * wide + column;
                                     const bool early = apart && is_early(stage, first + row + i);
                                     if (block.steps.there && !early)
                                         encode_steps(from, columns, block.steps, to);
                                     else
                                         encode_activated<decltype(kind)::value>(from, columns,
                                                                                 block.fc2.grid_of(early), to);
                                 }
                             });
        });
        return;
    }
    // With a gate or a norm: whole rows in float first. Parts: what passes the activation, and what multiplies it.
    const int columns = mlp == Mlp::plain ? hidden : 2 * hidden;
    own.wide.resize(size_t(count) * columns);
    auto keep = [&](const Linear& layer, const uint8_t* codes, int at) {
        linear_of_tokens(stage, layer, first, count, codes, lda,
                         [&](int row, int rows, int column, int n, const float* values, int stride) {
                             for (int i = 0; i < rows; ++i)
                                 std::copy_n(values + i * stride, n,
                                             own.wide.data() + size_t(row + i) * columns + at + column);
                         });
    };
    if (gated) keep(block.gate, own.second_codes.data(), 0);
    keep(block.fc1, own.codes.data(), gated ? hidden : 0);
    const int active = mlp == Mlp::glu_last ? hidden : 0, factor = hidden - active;
    with_activation(activation, [&](auto kind) {
        for (int i = 0; i < count; ++i) {
            float* row = own.wide.data() + size_t(i) * columns;
            for (int j = 0; j < hidden; ++j) {
                const float value = activate<decltype(kind)::value>(row[active + j]);
                own.rows[size_t(j)] = columns > hidden ? value * row[factor + j] : value;
            }
            if (block.mlp_norm.there) block.mlp_norm(own.rows.data(), row, hidden);
            encode(block.mlp_norm.there ? row : own.rows.data(), hidden, block.fc2.grid_of(is_early(stage, first + i)),
                   own.hidden.data() + size_t(i) * wide);
        }
    });
}

// One head of one window, for the queries from `first` to `last`.
void Model::attend(const Stage& stage, const Block& block, bool shifted, int image, int window, int head, int first,
                   int last, Scratch& own) {
    Watch watch(watching, own.seconds[kAttention]);
    const HeadNumbers& grids = block.heads[size_t(head)];
    const int d = stage.each, dim = stage.dim, groups = d / 4, area = stage.area, columns = round_up(area, kColumns);
    const int64_t row = 3 * int64_t(dim);
    const int* place = stage.place[shifted].empty() ? nullptr : stage.place[shifted].data() + size_t(window) * area;
    auto token = [&](int t) {
        return size_t(image) * stage.tokens + size_t(place ? place[t] : t);
    };
    const uint8_t* base = qkv.data() + size_t(head) * d;
    auto keys = [&](int t) {
        return (const int8_t*)(base + token(t) * row + dim);
    };
    auto values = [&](int t) {
        return (const int8_t*)(base + token(t) * row + 2 * dim);
    };

    // The largest of some integers of both signs, as far as the form of the products asks for it.
    auto largest = [&](auto&& of) {
        int least = 0, most = 0;
#if defined(QVIT_AVX2)
        for (int i = 0; i < area; ++i) {
            const int8_t* x = of(i);
            for (int t = 0; t < d; ++t) least = x[t] < least ? x[t] : least, most = x[t] > most ? x[t] : most;
        }
#else
        (void)of;
#endif
        return std::max(most, -least);
    };

    // Keys as the right operand of the scores, (d, area); those of β_q are all that offsets add within a row.
    Panels& right = own.keys;
    right.n = area, right.k = d, right.groups = groups;
    right.bytes.resize(size_t(columns) * d);
    right.sums.resize(size_t(columns)), right.lowest.clear();
    own.key_add.resize(size_t(columns)), own.key_scale.assign(size_t(columns), 0);
    for (int j = 0; j < area; ++j) {
        const int8_t* key = keys(j);
        int32_t sum = 0;
        int8_t* to = right.bytes.data() + size_t(j / kColumns) * groups * kColumns * 4 + (j % kColumns) * 4;
        for (int g = 0; g < groups; ++g) std::memcpy(to + size_t(g) * kColumns * 4, key + 4 * g, 4);
        for (int t = 0; t < d; ++t) sum += key[t];
        right.sums[size_t(j)] = sum;
    }
    // Columns behind the last token have probability 0, so that what follows runs over whole vectors.
    for (int j = area; j < columns; ++j) {
        right.sums[size_t(j)] = 0, own.key_add[size_t(j)] = -1e30f;
        int8_t* to = right.bytes.data() + size_t(j / kColumns) * groups * kColumns * 4 + (j % kColumns) * 4;
        for (int g = 0; g < groups; ++g) std::memset(to + size_t(g) * kColumns * 4, 0, 4);
    }
    const int largest_key = largest(keys);

    // Values as the right operand of the weighted sums, (area, d).
    const int value_columns = round_up(d, kColumns);
    Panels& weighted = own.values;
    static const int8_t nothing[256] = {};
    const int largest_value = largest(values);
    // Those of the tokens from `first` to `last`; 0 for all others.
    auto fill_values = [&](Panels& to, int first, int last) {
        to.n = d, to.k = last, to.groups = round_up(last, 4) / 4;
        to.bytes.assign(size_t(value_columns) * to.groups * 4, 0);
        to.sums.assign(size_t(value_columns), 0), to.lowest.clear();
        alignas(64) int32_t sums[256] = {};
        for (int i = first / 4 * 4; i < last; i += 4) {
            const int8_t* from[4];
            for (int r = 0; r < 4; ++r) from[r] = i + r >= first && i + r < last ? values(i + r) : nothing;
            for (int begin = 0; begin < d; begin += kColumns)
                interleave(from[0] + begin, from[1] + begin, from[2] + begin, from[3] + begin,
                           std::min(kColumns, d - begin),
                           to.bytes.data() + (size_t(begin / kColumns) * to.groups + i / 4) * kColumns * 4);
            for (int r = 0; r < 4; ++r)
                for (int t = 0; t < d; ++t) sums[t] += from[r][t];
        }
        std::copy_n(sums, d, to.sums.data());
        to.begin(to.left, block.log_steps ? 0 : grids.probs.low,
                 block.log_steps ? 128 : grids.probs.high - grids.probs.low, largest_value);
    };
    const bool values_apart = block.splits_values && prefix > 0;
    fill_values(weighted, values_apart ? prefix : 0, area);
    if (values_apart) fill_values(own.prefix_values, 0, prefix);

    const float* bias =
        block.position_bias.empty() ? nullptr : block.position_bias.data() + size_t(head) * area * columns;
    const float* region =
        shifted && stage.mixed[size_t(window)] ? stage.region.data() + size_t(window) * columns : nullptr;
    own.scores.resize(size_t(kRows) * columns);
    own.probs.resize(size_t(kRows) * columns), own.second.resize(size_t(kRows) * columns);
    own.queries.resize(size_t(kRows) * d);
    const Grid output = grids.output;
    const float highest = float(grids.probs.high);
    // Adds the part of prefix tokens, whose values have another scale, to sums of `rows` weighted values.
    alignas(64) int32_t prefix_sums[kRows * kColumns];
    auto add_prefix_values = [&](int rows, const uint8_t* weights, float scale, int column, float* y) {
        if (!values_apart) return;
        multiply_tile(rows, weights, columns, own.prefix_values, own.prefix_values.left, column, prefix_sums);
        for (int i = 0; i < rows; ++i)
            add_scaled_row(prefix_sums + i * kColumns, scale * grids.prefix_value.scale, y + i * kColumns);
    };
    // Queries of prefix tokens go first where their grid is another one.
    const int border = block.splits_queries ? std::min(std::max(prefix, first), last) : first;
    const Grid* query = nullptr;
    float score_scale = 0;
    for (int begin = first, m; begin < last; begin += m) {
        const bool early = begin < border;
        const int end = early ? border : last;
        m = std::min(even(end - begin, kRows), end - begin);
        const Grid* next = early ? &grids.prefix_query : &grids.query;
        if (next != query) {
            query = next;
            right.begin(right.left, query->low, query->high - query->low, largest_key);
            score_scale = query->scale * grids.key.scale * stage.factor;
            for (int j = 0; j < area; ++j) {
                const Grid& key = j < prefix ? grids.prefix_key : grids.key;
                own.key_scale[size_t(j)] = query->scale * key.scale * stage.factor;
                own.key_add[size_t(j)] = query->offset * key.scale * stage.factor * float(right.sums[size_t(j)]);
            }
        }
        for (int i = 0; i < m; ++i) std::copy_n(base + token(begin + i) * row, d, own.queries.data() + size_t(i) * d);
        alignas(64) float greatest[kRows][16];
        std::fill_n(greatest[0], kRows * 16, -1e30f);
        multiply(m, own.queries.data(), d, right, right.left,
                 [&](int r, int rows, int column, int, const int32_t* sums) {
                     const float* add = own.key_add.data() + column;
                     for (int i = 0; i < rows; ++i) {
                         float *to = own.scores.data() + size_t(r + i) * columns + column, *most = greatest[r + i];
                         if (block.splits_keys)
                             scale_row(sums + i * kColumns, own.key_scale.data() + column, add, to);
                         else
                             scale_row(sums + i * kColumns, score_scale, add, to);
                         if (bias) add_row(bias + size_t(begin + r + i) * columns + column, kColumns, to);
                         if (region) {
                             const float own_region = region[begin + r + i];
                             for (int j = 0; j < kColumns; ++j)
                                 to[j] += region[column + j] != own_region ? -100.0f : 0.0f;
                         }
                         greatest_of(to, most);
                     }
                 });
        alignas(64) float prob_sums[kRows];
        for (int i = 0; i < m; ++i) {
            float* s = own.scores.data() + size_t(i) * columns;
            uint8_t *p = own.probs.data() + size_t(i) * columns, *second = own.second.data() + size_t(i) * columns;
            float most = s[0];
            for (float value : greatest[i]) most = value > most ? value : most;
            if (block.log_steps) {
                own.exponentials.assign(s, s + columns);
                exponentials(own.exponentials.data(), columns, most);
                const float level_of_one = std::log2(sum_of(own.exponentials.data(), columns) * grids.probs.scale);
                log_levels(s, columns, most, level_of_one, block.log_steps, highest, p, second);
                continue;
            }
            exponentials(s, columns, most);
            const float total = sum_of(s, columns);
            Grid grid = grids.probs;
            grid.offset *= total, grid.inverse /= total;
            encode(s, columns, grid, p);
            int32_t codes = 0;
            for (int j = 0; grids.value.offset != 0 && j < area; ++j) codes += p[j];
            prob_sums[i] = float(codes + area * grid.low);
        }
        auto finish = [&](int r, int rows, int column, int cols, const float* y, int stride) {
            for (int i = 0; i < rows; ++i)
                encode(y + i * stride, cols, output,
                       merged.data() + token(begin + r + i) * dim + size_t(head) * d + column);
        };
        if (!block.log_steps) {
            alignas(64) float y[kRows * kColumns], by_column[256 + kColumns];
            const float scale = grids.probs.scale * grids.value.scale;
            const float by_probs = grids.probs.scale * grids.value.offset,
                        by_value = grids.probs.offset * grids.value.scale;
            const float constant = float(area) * grids.probs.offset * grids.value.offset;
            for (int t = 0; t < d; ++t) by_column[t] = by_value * float(weighted.sums[size_t(t)]) + constant;
            for (int t = 0; values_apart && t < d; ++t)
                by_column[t] +=
                    grids.probs.offset * grids.prefix_value.scale * float(own.prefix_values.sums[size_t(t)]);
            multiply(m, own.probs.data(), columns, weighted, weighted.left,
                     [&](int r, int rows, int column, int cols, const int32_t* sums) {
                         for (int i = 0; i < rows; ++i) {
                             scale_row(sums + i * kColumns, scale, by_column + column, y + i * kColumns);
                             if (by_probs != 0) add_number(prob_sums[r + i] * by_probs, y + i * kColumns);
                         }
                         add_prefix_values(rows, own.probs.data() + size_t(r) * columns, grids.probs.scale, column, y);
                         finish(r, rows, column, cols, y, kColumns);
                     });
            continue;
        }
        // Even and odd codes (log-sqrt2), or large and small levels (log2), are two operands of powers of two.
        const float one = grids.probs.scale * grids.value.scale / 128.0f;
        const float other = block.log_steps == 2 ? 0.70710678f : 1 / 256.0f, other_one = one * other;
        const float of_prefix = grids.probs.scale / 128.0f;
        alignas(64) static const float zeros[kColumns] = {};
        alignas(64) int32_t sums[kRows * kColumns];
        alignas(64) float y[kRows * kColumns];
        for (int column = 0; column < d; column += kColumns) {
            multiply_tile(m, own.probs.data(), columns, weighted, weighted.left, column, sums);
            for (int i = 0; i < m; ++i) scale_row(sums + i * kColumns, one, zeros, y + i * kColumns);
            multiply_tile(m, own.second.data(), columns, weighted, weighted.left, column, sums);
            for (int i = 0; i < m; ++i) add_scaled_row(sums + i * kColumns, other_one, y + i * kColumns);
            add_prefix_values(m, own.probs.data(), of_prefix, column, y);
            add_prefix_values(m, own.second.data(), of_prefix * other, column, y);
            finish(0, m, column, std::min(kColumns, d - column), y, kColumns);
        }
    }
}

void Model::classify(const Stage& stage, int image, float* logits, Scratch& own) {
    Watch watch(watching, own.seconds[kHead]);
    const int dim = stage.dim, tokens = stage.tokens;
    own.rows.resize(std::max(size_t(most_channels), size_t(2 * dim)));
    float *pooled = own.rows.data(), *row = pooled + dim;
    const float* x = stream.data() + size_t(image) * tokens * dim;
    auto normed = [&](int token) {
        if (!norm.there) return x + size_t(token) * dim;
        norm(x + size_t(token) * dim, row, dim);
        return (const float*)row;
    };
    if (pool == 0) {
        std::copy_n(normed(0), dim, pooled);
    } else {
        const int first = pool == 1 ? prefix : 0;
        std::fill_n(pooled, dim, 0.0f);
        for (int token = first; token < tokens; ++token) {
            const float* from = normed(token);
            for (int j = 0; j < dim; ++j) pooled[j] += from[j];
        }
        for (int j = 0; j < dim; ++j) pooled[j] /= float(tokens - first);
    }
    if (head_norm.there) {
        head_norm(pooled, row, dim);
        std::copy_n(row, dim, pooled);
    }
    own.codes.resize(size_t(round_up(dim, 4)));
    encode(pooled, dim, head.grid[0], own.codes.data());
    linear(head, 1, own.codes.data(), dim, [&](int, int, int column, int columns, const float* values, int) {
        std::copy_n(values, columns, logits + size_t(image) * classes + column);
    });
}

void Model::forward(const float* images, int batch, float* logits) {
    size_t most = 0, blocks = 0;
    for (const Stage& stage : stages)
        most = std::max(most, size_t(stage.tokens) * stage.dim), blocks += stage.blocks.size();
    const size_t size = most * size_t(batch);
    stream.resize(size), merged.resize(size), qkv.resize(3 * size);
    if (stages.size() > 1) other.resize(size);
    const int threads = team->size();
    std::vector<std::atomic<int>> counters(blocks);
    for (auto& counter : counters) counter = 0;
    auto share = [&](int64_t count, int part) {
        return int(count * part / threads);
    };
    auto wait = [&](int thread) {
        Watch watch(watching, scratch[size_t(thread)].seconds[kWaiting]);
        team->barrier();
    };
    // Of a stage on a thread: rows, then heads, per block; whatever comes before the first block is done already.
    auto run_stage = [&](const Stage& stage, std::atomic<int>* counter, int thread) {
        Scratch& own = scratch[size_t(thread)];
        const int first = share(int64_t(batch) * stage.tokens, thread),
                  last = share(int64_t(batch) * stage.tokens, thread + 1);
        const int step = last > first ? even(last - first, kChunk) : kChunk;
        // Queries of a head are split where there are too few heads for an even share.
        int parts = 1;
        while (batch * stage.windows * stage.heads * parts < 3 * threads && parts < 8) ++parts;
        const int items = batch * stage.windows * stage.heads * parts;
        for (size_t index = 0; index <= stage.blocks.size(); ++index) {
            for (int begin = first; begin < last; begin += step) {
                const int end = std::min(last, begin + step);
                if (index > 0) finish_block(stage, stage.blocks[index - 1], begin, end, own);
                if (index < stage.blocks.size()) project_qkv(stage, stage.blocks[index], begin, end, own);
            }
            wait(thread);
            if (index == stage.blocks.size()) break;
            for (int item; (item = counter[index].fetch_add(1, std::memory_order_relaxed)) < items;) {
                const int part = item % parts, h = item / parts % stage.heads,
                          window = item / parts / stage.heads % stage.windows;
                attend(stage, stage.blocks[index], index % 2 && !stage.place[1].empty(),
                       item / parts / stage.heads / stage.windows, window, h, int(int64_t(stage.area) * part / parts),
                       int(int64_t(stage.area) * (part + 1) / parts), own);
            }
            wait(thread);
        }
    };
    team->run([&](int thread) {
        Scratch& own = scratch[size_t(thread)];
        const Stage& begin = stages.front();
        const int patches = begin.rows * begin.columns * batch;
        for (int image = share(batch, thread); image < share(batch, thread + 1); ++image)
            std::copy_n(added.data(), size_t(prefix) * begin.dim,
                        stream.data() + size_t(image) * begin.tokens * begin.dim);
        embed_patches(begin, images, share(patches, thread), share(patches, thread + 1), own);
        wait(thread);
        if (first_norm.there) {
            own.rows.resize(size_t(most_channels));
            for (int i = share(int64_t(batch) * begin.tokens, thread);
                 i < share(int64_t(batch) * begin.tokens, thread + 1); ++i) {
                first_norm(stream.data() + size_t(i) * begin.dim, own.rows.data(), begin.dim);
                std::copy_n(own.rows.data(), begin.dim, stream.data() + size_t(i) * begin.dim);
            }
        }
        std::atomic<int>* counter = counters.data();
        for (size_t s = 0; s < stages.size(); ++s) {
            const Stage& stage = stages[s];
            if (s > 0) {
                if (thread == 0) stream.swap(other);
                wait(thread);
                const int64_t rows = int64_t(batch) * stage.tokens;
                merge_tokens(stages[s - 1], stage, other.data(), share(rows, thread), share(rows, thread + 1), own);
            }
            run_stage(stage, counter, thread);
            counter += stage.blocks.size();
        }
        for (int image = share(batch, thread); image < share(batch, thread + 1); ++image)
            classify(stages.back(), image, logits, own);
    });
}
