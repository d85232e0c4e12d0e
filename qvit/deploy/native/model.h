// A Vision Transformer on integers, from images to logits or features. Included once per instruction set, after
// kernels.h, inside the same namespace. `deploy/integer/reference.py` has what is computed, operation by operation.
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

// Numbers of a row that may end within sixteen lanes: from `count` on they are 0.
QVIT_INLINE Lanes kept(const Lanes& x, int count) {
    if (count >= kLanes) return x;
    float part[kLanes];
    x.store(part);
    return load(part, count);
}

// The sum of f(j) for each sixteen of n numbers, over four partial sums.
template <class F>
QVIT_INLINE float total_of(int n, F&& f) {
    Lanes a, b, c, d;
    int j = 0;
    for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
        a = a + f(j), b = b + f(j + kLanes);
        c = c + f(j + 2 * kLanes), d = d + f(j + 3 * kLanes);
    }
    for (; j < n; j += kLanes) a = a + f(j);
    return total((a + b) + (c + d));
}

struct Norm {
    bool there = false, centred = true;
    float epsilon = 0;
    Integer form = Integer::none;
    Affine affine;
    Buffer<float> weight, bias;

    Norm() = default;
    explicit Norm(const NormNumbers& from)
        : there(from.there), centred(from.centred), epsilon(from.epsilon), form(from.form) {
        if (form != Integer::none) affine = Affine(from.weight, from.bias);
        const size_t size = size_t(round_up(int(from.weight.size()), kLanes) + kLanes);
        weight.assign(size, 0), bias.assign(size, 0);
        std::copy(from.weight.begin(), from.weight.end(), weight.begin());
        std::copy(from.bias.begin(), from.bias.end(), bias.begin());
    }
    // `use(j, values)` for sixteen of the n channels after the other. `first`: where in weight and bias they begin.
    template <class Use>
    QVIT_INLINE void each(const float* x, int n, int first, Use&& use) const {
        if (form != Integer::none) {
            float values[kMostNormed];
            on_integers(x, n, first, values);
            for (int j = 0; j < n; j += kLanes) use(j, load(values + j, n - j));
            return;
        }
        Lanes mean;
        if (centred) mean = Lanes(total_of(n, [&](int j) { return load(x + j, n - j); }) / float(n));
        const float squares = total_of(n, [&](int j) {
            const Lanes apart = kept(load(x + j, n - j) - mean, n - j);
            return apart * apart;
        });
        const Lanes factor(1.0f / std::sqrt(squares / float(n) + epsilon));
        const float *by = weight.data() + first, *add = bias.data() + first;
        for (int j = 0; j < n; j += kLanes)
            use(j, (load(x + j, n - j) - mean) * factor * Lanes(by + j) + Lanes(add + j));
    }
    void on_integers(const float* x, int n, int first, float* to) const {
        int32_t codes[kMostNormed];
        fix(x, n, 4096.0f, float((1 << 24) - 1), codes);
        normalize(form, codes, n);
        affine(codes, n, first, to);
    }
    void operator()(const float* x, float* to, int n, int first = 0) const {
        each(x, n, first, [&](int j, const Lanes& y) { store(to + j, y, n - j); });
    }
    // Codes of the normed row; of the row as it is where there is no norm.
    void encode_row(const float* x, int n, const Grid& grid, uint8_t* to) const {
        if (!there) return encode(x, n, grid, to);
        const Coder<Lanes> coder(grid);
        each(x, n, 0, [&](int j, const Lanes& y) { store(to + j, coder.bytes(y), n - j); });
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

// Sixteen of them in registers.
struct ColumnCoder {
    Lanes inverse, offset, low, high, shift;

    QVIT_INLINE ColumnCoder(const Columns& from, int column)
        : inverse(from.inverse.data() + column),
          offset(from.offset.data() + column),
          low(from.low.data() + column),
          high(from.high.data() + column),
          shift(from.shift.data() + column) {}
    QVIT_INLINE Bytes bytes(const Lanes& x) const {
        return bytes_of(nearest(lesser_of(greater_of((x - offset) * inverse, low), high)) - shift, 0);
    }
};

struct Block {
    Norm norm1, norm2, mlp_norm, query_norm, key_norm;
    Linear qkv, proj, fc1, gate, fc2;
    std::vector<HeadNumbers> heads;
    int log_steps = 0;
    Activation activation;
    Integer softmax;
    bool splits_queries, splits_keys, splits_values;
    Columns columns, prefix_columns;  // of all tokens, or but for prefix tokens; and of these
    Buffer<float> position_bias;      // (heads, area, columns of scores), in units of scores; or none
    Steps steps;                      // from outputs of fc1 to inputs of fc2

    // What scores are multiplied by.
    float score_unit() const { return softmax == Integer::none ? kLog2E : kScoreUnit; }

    Block(const BlockNumbers& from, const StageNumbers& stage)
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
          activation(from.activation),
          softmax(from.softmax),
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
            for (int j = 0; j < area; ++j)
                position_bias[size_t(i) * wide + j] = from.position_bias[size_t(i) * area + j] * score_unit();
    }
};

struct Stage {
    int dim, heads, each, hidden, rows, columns, tokens;
    int skip, windows = 1, area;  // tokens without attention; windows of an image; tokens of a window
    float factor;                 // of the scores
    Norm merge_norm;
    Linear merge;
    std::vector<Block> blocks;
    // For windows, without a shift and with it: the token at each place, and regions that do not attend to one another.
    std::vector<int> place[2];
    Buffer<float> region;     // (windows, columns of scores), of shifted windows
    std::vector<char> mixed;  // windows that hold several regions

    Stage(const StageNumbers& from, int prefix)
        : dim(from.dim),
          heads(from.heads),
          each(dim / heads),
          hidden(from.hidden),
          rows(from.rows),
          columns(from.columns),
          tokens(rows * columns + prefix),
          skip(from.skip),
          area(tokens - skip),
          factor(1.0f / std::sqrt(float(each))),
          merge_norm(from.merge_norm),
          merge(from.merge) {
        for (const BlockNumbers& block : from.blocks) blocks.emplace_back(block, from);
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
    Buffer<float> rows, scores, projected, wide;
    Buffer<int32_t> whole;
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
          width(from.width),
          pool(from.pool),
          mlp(from.mlp),
          embed(from.embed),
          head(from.head),
          patch_norm(from.patch_norm),
          first_norm(from.first_norm),
          norm(from.norm),
          head_norm(from.head_norm),
          threads_(threads) {
        added.assign(from.added.begin(), from.added.end());
        for (const StageNumbers& stage : from.stages) stages.emplace_back(stage, prefix);
        for (const StageNumbers& stage : from.map) map.emplace_back(stage, prefix);
        for (const auto* list : {&stages, &map})
            for (const Stage& stage : *list)
                most_channels = std::max(most_channels, std::max(stage.hidden, 4 * stage.dim));
        team = std::make_unique<Team>(threads);
        scratch.resize(size_t(threads));
    }

    // After a fork the threads are not there.
    void after_fork() override {
        (void)team.release();
        team = std::make_unique<Team>(threads_);
    }
    void run(const float* images, int batch, float* answers) override { forward(images, batch, answers); }
    void profile(const float* images, int batch, float* answers, double* seconds) override {
        watching = true;
        for (Scratch& own : scratch) std::fill_n(own.seconds, kKinds, 0.0);
        forward(images, batch, answers);
        watching = false;
        for (int kind = 0; kind < kKinds; ++kind) {
            seconds[kind] = 0;
            for (const Scratch& own : scratch) seconds[kind] += own.seconds[kind] / double(scratch.size());
        }
    }

  private:
    static constexpr int kChunk = 36;

    int channels, side_y, side_x, patch_y, patch_x, prefix, width, most_channels = 0;
    Pool pool;
    Mlp mlp;
    Linear embed, head;
    Norm patch_norm, first_norm, norm, head_norm;
    Buffer<float> added;
    std::vector<Stage> stages, map;  // map: of one block, or none
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
    void forward(const float* images, int batch, float* answers);
    void embed_patches(const Stage& stage, const float* images, int first, int last, Scratch& own);
    void merge_tokens(const Stage& before, const Stage& stage, const float* from, int first, int last, Scratch& own);
    void project_qkv(const Stage& stage, const Block& block, int first, int last, Scratch& own);
    void finish_block(const Stage& stage, const Block& block, int first, int last, Scratch& own);
    void hidden_codes(const Stage& stage, const Block& block, int first, int count, Scratch& own);
    template <Activation kind, class Outputs>
    void activate_tile(const Stage& stage, const Block& block, int first, int rows, uint8_t* to, int64_t wide,
                       int columns, Outputs&& y) const;
    void attend(const Stage& stage, const Block& block, bool shifted, int image, int window, int head, int first,
                int last, Scratch& own);
    void pool_tokens(const Stage& stage, int row, float* to, Scratch& own) const;
    void answer(const Stage& stage, int first, int last, float* answers, Scratch& own);
};

// The outputs of a layer for m rows, tile after tile and sixteen columns after the other: `use(row, rows, column,
// count, y)`, where y(i) are those of the tile's row i, of which `count` or all are there. `early`: they are of prefix
// tokens.
template <class Use>
void Model::linear(const Linear& layer, int m, const uint8_t* a, int64_t lda, Use&& use, bool early) {
    if (layer.segments == 1) {
        const bool own = early && layer.splits;
        const float* scale = (own ? layer.prefix_scale : layer.scale).data();
        const float* bias = (own ? layer.prefix_bias : layer.bias).data();
        const Panels& panels = layer.panels[0];
        multiply(m, a, lda, panels, own ? panels.prefix : panels.left,
                 [&](int row, int rows, int column, int columns, const int32_t* sums) {
                     for (int j = 0; j < columns; j += kLanes) {
                         const Lanes by(scale + column + j), add(bias + column + j);
                         use(row, rows, column + j, columns - j,
                             [=](int i) { return of_integers(sums + i * kColumns + j) * by + add; });
                     }
                 });
        return;
    }
    // Tile by tile, the segments' sums with their scales.
    const int k = layer.k / layer.segments, step = even(m, kRows);
    alignas(64) int32_t sums[kRows * kColumns];
    alignas(64) float values[kRows * kColumns];
    for (int column = 0; column < layer.n; column += kColumns)
        for (int row = 0; row < m; row += step) {
            const int rows = std::min(step, m - row), columns = std::min(kColumns, layer.n - column);
            for (int s = 0; s < layer.segments; ++s) {
                const Panels& panels = layer.panels[size_t(s)];
                multiply_tile(rows, a + row * lda + s * k, lda, panels, panels.left, column, sums);
                for (int j = 0; j < columns; j += kLanes) {
                    const Lanes by(layer.scale.data() + size_t(s) * layer.padded + column + j),
                        add(layer.bias.data() + column + j);
                    for (int i = 0; i < rows; ++i) {
                        float* to = values + i * kColumns + j;
                        ((s ? Lanes(to) : add) + of_integers(sums + i * kColumns + j) * by).store(to);
                    }
                }
            }
            for (int j = 0; j < columns; j += kLanes)
                use(row, rows, column + j, columns - j, [&](int i) { return Lanes(values + i * kColumns + j); });
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
            [&](int row, int rows, int column, int count, auto&& y) { use(begin + row, rows, column, count, y); },
            early);
    }
}

void Model::embed_patches(const Stage& stage, const float* images, int first, int last, Scratch& own) {
    Watch watch(watching, own.seconds[kEmbedding]);
    const int across = stage.columns, patches = stage.rows * stage.columns, dim = stage.dim, lda = round_up(embed.k, 4);
    const Coder<Lanes> coder(embed.grid[0]);
    for (int begin = first; begin < last; begin += kChunk) {
        const int end = std::min(last, begin + kChunk);
        own.hidden.resize(size_t(kChunk) * lda);
        for (int p = begin; p < end; ++p) {
            const float* image = images + size_t(p / patches) * channels * side_y * side_x;
            const int place = p % patches, top = place / across * patch_y, left = place % across * patch_x;
            uint8_t* to = own.hidden.data() + size_t(p - begin) * lda;
            std::fill_n(to + embed.k, lda - embed.k, uint8_t(0));
            for (int c = 0; c < channels; ++c)
                for (int y = 0; y < patch_y; ++y, to += patch_x) {
                    const float* from = image + (size_t(c) * side_y + top + y) * side_x + left;
                    for (int x = 0; x < patch_x; x += kLanes)
                        store(to + x, coder.bytes(load(from + x, patch_x - x)), patch_x - x);
                }
        }
        auto row_of = [&](int p) {
            return stream.data() + (size_t(p / patches) * stage.tokens + prefix + p % patches) * dim;
        };
        linear(embed, end - begin, own.hidden.data(), lda, [&](int row, int rows, int column, int count, auto&& y) {
            for (int i = 0; i < rows; ++i) {
                const int p = begin + row + i;
                Lanes value = y(i);
                if (!added.empty() && !patch_norm.there)
                    value = value + load(added.data() + size_t(prefix + p % patches) * dim + column, count);
                store(row_of(p) + column, value, count);
            }
        });
        for (int p = begin; p < end && patch_norm.there; ++p) {
            float* row = row_of(p);
            const float* add = added.empty() ? nullptr : added.data() + size_t(prefix + p % patches) * dim;
            patch_norm.each(row, dim, 0, [&](int j, const Lanes& y) {
                store(row + j, add ? y + load(add + j, dim - j) : y, dim - j);
            });
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
        own.wide.resize(size_t(k));
        for (int p = begin; p < end; ++p) {
            const int place = p % stage.tokens, y = place / stage.columns * 2, x = place % stage.columns * 2;
            const float* image = from + size_t(p / stage.tokens) * before.tokens * dim;
            for (int part = 0; part < 4; ++part)  // down, then right
                std::copy_n(image + size_t((y + part % 2) * before.columns + x + part / 2) * dim, dim,
                            own.wide.data() + part * dim);
            stage.merge_norm.encode_row(own.wide.data(), k, stage.merge.grid[0],
                                        own.hidden.data() + size_t(p - begin) * lda);
        }
        linear(stage.merge, end - begin, own.hidden.data(), lda,
               [&](int row, int rows, int column, int count, auto&& y) {
                   for (int i = 0; i < rows; ++i)
                       store(stream.data() + size_t(begin + row + i) * stage.dim + column, y(i), count);
               });
    }
}

void Model::project_qkv(const Stage& stage, const Block& block, int first, int last, Scratch& own) {
    const int dim = stage.dim, lda = round_up(dim, 4), count = last - first;
    own.codes.resize(size_t(count) * lda);
    {
        Watch watch(watching, own.seconds[kNorm]);
        for (int i = 0; i < count; ++i) {
            const Grid& grid = block.qkv.grid_of(is_early(stage, first + i));
            block.norm1.encode_row(stream.data() + size_t(first + i) * dim, dim, grid,
                                   own.codes.data() + size_t(i) * lda);
        }
    }
    Watch watch(watching, own.seconds[kQkv]);
    if (!block.query_norm.there && !block.key_norm.there) {
        linear_of_tokens(stage, block.qkv, first, count, own.codes.data(), lda,
                         [&](int row, int rows, int column, int columns, auto&& y) {
                             uint8_t* to = qkv.data() + size_t(first + row) * 3 * dim + column;
                             const ColumnCoder plain(block.columns, column);
                             if (block.prefix_columns.inverse.empty()) {
                                 for (int i = 0; i < rows; ++i) store(to + i * 3 * dim, plain.bytes(y(i)), columns);
                                 return;
                             }
                             const ColumnCoder early(block.prefix_columns, column);
                             for (int i = 0; i < rows; ++i)
                                 store(to + i * 3 * dim, (is_early(stage, first + row + i) ? early : plain).bytes(y(i)),
                                       columns);
                         });
        return;
    }
    own.projected.resize(size_t(count) * 3 * dim);
    linear_of_tokens(stage, block.qkv, first, count, own.codes.data(), lda,
                     [&](int row, int rows, int column, int columns, auto&& y) {
                         for (int i = 0; i < rows; ++i)
                             store(own.projected.data() + size_t(row + i) * 3 * dim + column, y(i), columns);
                     });
    for (int i = 0; i < count; ++i) {
        float* row = own.projected.data() + size_t(i) * 3 * dim;
        for (const Norm* norm : {&block.query_norm, &block.key_norm}) {
            float* part = row + (norm == &block.key_norm ? dim : 0);
            for (int h = 0; norm->there && h < stage.heads; ++h)
                (*norm)(part + h * stage.each, part + h * stage.each, stage.each, h * stage.each);
        }
        const bool early = !block.prefix_columns.inverse.empty() && is_early(stage, first + i);
        for (int j = 0; j < 3 * dim; j += kLanes)
            store(qkv.data() + size_t(first + i) * 3 * dim + j,
                  ColumnCoder(early ? block.prefix_columns : block.columns, j).bytes(load(row + j, 3 * dim - j)),
                  3 * dim - j);
    }
}

void Model::finish_block(const Stage& stage, const Block& block, int first, int last, Scratch& own) {
    const int dim = stage.dim, wide = round_up(stage.hidden, 4), count = last - first;
    auto add_to_stream = [&](int row, int rows, int column, int columns, auto&& y) {
        for (int i = 0; i < rows; ++i) {
            float* to = stream.data() + size_t(first + row + i) * dim + column;
            store(to, load(to, columns) + y(i), columns);
        }
    };
    {
        Watch watch(watching, own.seconds[kProj]);
        linear(block.proj, count, merged.data() + size_t(first) * dim, dim, add_to_stream);
    }
    hidden_codes(stage, block, first, count, own);
    Watch watch(watching, own.seconds[kSecond]);
    linear_of_tokens(stage, block.fc2, first, count, own.hidden.data(), wide, add_to_stream);
}

// Codes of activated outputs of fc1: sixteen columns of some rows of the stream.
template <Activation kind, class Outputs>
void Model::activate_tile(const Stage& stage, const Block& block, int first, int rows, uint8_t* to, int64_t wide,
                          int columns, Outputs&& y) const {
    const Coder<Lanes> plain(block.fc2.grid[0]), early(block.fc2.prefix_grid);
    const StepCoder steps(block.steps);
    auto code = [&](const Lanes& x) {
        return block.steps.there ? steps.bytes(x) : plain.bytes(activate<kind>(x));
    };
    if (block.fc2.splits) {
        for (int i = 0; i < rows; ++i)
            store(to + i * wide, is_early(stage, first + i) ? early.bytes(activate<kind>(y(i))) : code(y(i)), columns);
#if defined(QVIT_AVX512_VNNI)
    } else if (steps.in_cells()) {
        for (int i = 0; i < rows; ++i) store(to + i * wide, steps.bytes_by_cell(y(i)), columns);
#endif
    } else if (block.steps.there) {
        for (int i = 0; i < rows; ++i) store(to + i * wide, steps.bytes(y(i)), columns);
    } else {
        for (int i = 0; i < rows; ++i) store(to + i * wide, plain.bytes(activate<kind>(y(i))), columns);
    }
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
            const bool early = is_early(stage, first + i);
            block.norm2.encode_row(row, dim, block.fc1.grid_of(early), own.codes.data() + size_t(i) * lda);
            if (gated)
                block.norm2.encode_row(row, dim, block.gate.grid_of(early), own.second_codes.data() + size_t(i) * lda);
        }
    }
    Watch watch(watching, own.seconds[kFirst]);
    if (mlp == Mlp::plain && !block.mlp_norm.there) {
        with_activation(block.activation, [&](auto kind) {
            linear_of_tokens(stage, block.fc1, first, count, own.codes.data(), lda,
                             [&](int row, int rows, int column, int columns, auto&& y) {
                                 activate_tile<decltype(kind)::value>(stage, block, first + row, rows,
                                                                      own.hidden.data() + size_t(row) * wide + column,
                                                                      wide, columns, y);
                             });
        });
        return;
    }
    // With a gate or a norm: whole rows in float first. Parts: what passes the activation, and what multiplies it.
    const int columns = mlp == Mlp::plain ? hidden : 2 * hidden;
    own.wide.resize(size_t(count) * columns);
    auto keep = [&](const Linear& layer, const uint8_t* codes, int at) {
        linear_of_tokens(stage, layer, first, count, codes, lda, [&](int row, int rows, int column, int n, auto&& y) {
            for (int i = 0; i < rows; ++i) store(own.wide.data() + size_t(row + i) * columns + at + column, y(i), n);
        });
    };
    if (gated) keep(block.gate, own.second_codes.data(), 0);
    keep(block.fc1, own.codes.data(), gated ? hidden : 0);
    const int active = mlp == Mlp::glu_last ? hidden : 0, factor = hidden - active;
    with_activation(block.activation, [&](auto kind) {
        for (int i = 0; i < count; ++i) {
            float* row = own.wide.data() + size_t(i) * columns;
            for (int j = 0; j < hidden; j += kLanes) {
                const Lanes value = activate<decltype(kind)::value>(load(row + active + j, hidden - j));
                store(own.rows.data() + j, columns > hidden ? value * load(row + factor + j, hidden - j) : value,
                      hidden - j);
            }
            block.mlp_norm.encode_row(own.rows.data(), hidden, block.fc2.grid_of(is_early(stage, first + i)),
                                      own.hidden.data() + size_t(i) * wide);
        }
    });
}

// What the head sees of an image, or of a token where none are pooled.
void Model::pool_tokens(const Stage& stage, int row, float* to, Scratch& own) const {
    const int dim = stage.dim, tokens = stage.tokens;
    auto normed = [&](size_t token, float* to) {
        const float* x = stream.data() + token * dim;
        norm.there ? norm(x, to, dim) : void(std::copy_n(x, dim, to));
    };
    const size_t begin = size_t(row) * tokens;
    if (pool == Pool::none) return normed(size_t(row), to);
    if (pool == Pool::token) return normed(begin, to);
    if (pool == Pool::map) return normed(begin + map.front().skip, to);
    own.rows.resize(size_t(most_channels));
    float *one = own.rows.data(), *most = one + dim;
    std::fill_n(to, dim, 0.0f), std::fill_n(most, dim, -std::numeric_limits<float>::infinity());
    const int first = pool == Pool::all ? 0 : prefix;
    for (int token = first; token < tokens; ++token) {
        normed(begin + token, one);
        for (int j = 0; j < dim; ++j) to[j] += one[j], most[j] = std::max(most[j], one[j]);
    }
    for (int j = 0; j < dim; ++j) {
        to[j] /= float(tokens - first);
        if (pool == Pool::max) to[j] = most[j];
        if (pool == Pool::avgmax) to[j] = 0.5f * (most[j] + to[j]);
    }
}

// Answers from `first` to `last`: of images, or of tokens where none are pooled. Without a head they are features.
void Model::answer(const Stage& stage, int first, int last, float* answers, Scratch& own) {
    Watch watch(watching, own.seconds[kHead]);
    const int dim = stage.dim;
    own.wide.resize(size_t(dim)), own.codes.resize(size_t(kChunk) * dim);
    for (int begin = first; begin < last; begin += kChunk) {
        const int end = std::min(last, begin + kChunk);
        for (int row = begin; row < end; ++row) {
            float* x = head.n ? own.wide.data() : answers + size_t(row) * dim;
            pool_tokens(stage, row, x, own);
            if (head_norm.there) head_norm(x, x, dim);
            if (head.n) encode(x, dim, head.grid[0], own.codes.data() + size_t(row - begin) * dim);
        }
        if (!head.n) continue;
        linear(head, end - begin, own.codes.data(), dim, [&](int row, int rows, int column, int columns, auto&& y) {
            for (int i = 0; i < rows; ++i) store(answers + size_t(begin + row + i) * width + column, y(i), columns);
        });
    }
}

void Model::forward(const float* images, int batch, float* answers) {
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
    // The tokens' keys and values, heads, then what becomes of their outputs: in the stream, at the first token seen.
    auto pool_by_map = [&](const Stage& stage, int thread) {
        Scratch& own = scratch[size_t(thread)];
        const Block& block = stage.blocks.front();
        const int last = share(int64_t(batch) * stage.tokens, thread + 1);
        for (int begin = share(int64_t(batch) * stage.tokens, thread); begin < last; begin += kChunk)
            project_qkv(stage, block, begin, std::min(last, begin + kChunk), own);
        wait(thread);
        const int64_t items = int64_t(batch) * stage.heads;
        for (int item = share(items, thread); item < share(items, thread + 1); ++item)
            attend(stage, block, false, item / stage.heads, 0, item % stage.heads, 0, 1, own);
        wait(thread);
        for (int image = share(batch, thread); image < share(batch, thread + 1); ++image) {
            const int row = image * stage.tokens + stage.skip;
            std::fill_n(stream.data() + size_t(row) * stage.dim, stage.dim, 0.0f);
            finish_block(stage, block, row, row + 1, own);
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
        const Stage& last = stages.back();
        for (const Stage& stage : map) pool_by_map(stage, thread);
        const int64_t count = pool == Pool::none ? int64_t(batch) * last.tokens : batch;
        answer(last, share(count, thread), share(count, thread + 1), answers, own);
    });
}
