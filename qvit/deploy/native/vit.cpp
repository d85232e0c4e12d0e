// A Vision Transformer on integers, from images to logits; see engine.py for what is computed and why it is exact.
//
// Per block there are two stages, with a barrier of all threads between them:
//
//   rows     a thread keeps a range of tokens from the output projection of one block to the q|k|v projection of the
//            next: proj, residual, LayerNorm, fc1, GELU, fc2, residual, LayerNorm, qkv. Between them lie codes of a few
//            dozen tokens, in the cache; only the residual stream is in float.
//   heads    a thread takes heads of images, or parts of their rows: scores, softmax, weighted values, codes.
//
// Codes are stored from 0: a left operand has the byte q - low, and the sums start at low * sum(w), which makes them
// exact sums of q * w. The results do not depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#define QVIT_FORKS 1
#endif

#include "kernels.h"

namespace qvit {

// ------------------------------------------------------------------------------------------------- memory and threads

template <class T>
struct Aligned {
    using value_type = T;
    Aligned() = default;
    template <class U>
    Aligned(const Aligned<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
    template <class U>
    bool operator==(const Aligned<U>&) const { return true; }
    template <class U>
    bool operator!=(const Aligned<U>&) const { return false; }
};
template <class T>
using Buffer = std::vector<T, Aligned<T>>;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Threads that run one function together; they wait awake for a moment, then asleep.
class Team {
  public:
    explicit Team(int size) : size_(size) {
        for (int i = 1; i < size; ++i) threads_.emplace_back([this, i] { work(i); });
    }
    ~Team() {
        tell([&] { stop_ = true, ++round_; });
        for (auto& thread : threads_) thread.join();
    }
    int size() const { return size_; }

    template <class F>
    void run(F&& task) {
        task_ = [](void* f, int i) { (*static_cast<std::remove_reference_t<F>*>(f))(i); };
        data_ = &task;
        left_.store(size_ - 1, std::memory_order_relaxed);
        tell([&] { round_.fetch_add(1, std::memory_order_release); });
        task(0);
        wait([this] { return left_.load(std::memory_order_acquire) == 0; });
    }

    // All threads of a running task arrive before one goes on.
    void barrier() {
        if (size_ == 1) return;
        const int phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            tell([&] { phase_.store(phase + 1, std::memory_order_release); });
        } else {
            wait([this, phase] { return phase_.load(std::memory_order_acquire) != phase; });
        }
    }

  private:
    // Changes what others wait for, and wakes those that sleep.
    template <class Change>
    void tell(Change change) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            change();
        }
        wake_.notify_all();
    }
    template <class Done>
    void wait(Done done) {
        for (int i = 0; i < kAwake; ++i) {
            if (done()) return;
            pause();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, done);
    }
    void work(int index) {
        for (int seen = 0; true;) {
            wait([&] { return round_.load(std::memory_order_acquire) != seen; });
            seen = round_.load(std::memory_order_acquire);
            if (stop_) return;
            task_(data_, index);
            tell([&] { left_.fetch_sub(1, std::memory_order_acq_rel); });
        }
    }

    static constexpr int kAwake = 4096;

    int size_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<int> round_{0}, left_{0}, arrived_{0}, phase_{0};
    bool stop_ = false;
    void (*task_)(void*, int) = nullptr;
    void* data_ = nullptr;
};

// ------------------------------------------------------------------------------------------------------ float functions
// Written as plain loops over these, which compilers turn into vector instructions.

inline float mad(float a, float b, float c) {  // a * b + c, rounded once where the processor can
#if defined(__FMA__) || defined(__aarch64__)
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

inline float exponential(float x) {  // relative error below 2e-7 for x <= 0; 0 far below
    const float kept = x < -87.0f ? -87.0f : x;
    const float n = std::rint(kept * 1.44269504f);
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

enum class Activation { gelu, gelu_tanh, quick_gelu, silu, relu };

template <Activation kind>
inline float activate(float x) {
    switch (kind) {
        case Activation::gelu: return gelu(x);
        case Activation::gelu_tanh: return x * sigmoid(1.5957691f * (x + 0.044715f * x * x * x));
        case Activation::quick_gelu: return x * sigmoid(1.702f * x);
        case Activation::silu: return x * sigmoid(x);
        case Activation::relu: return x > 0 ? x : 0;
    }
}

// A uniform grid: x = scale * q + offset, q from low to high.
struct Grid {
    float scale = 1, inverse = 1, offset = 0;
    int low = 0, high = 0;

    int32_t code(float x) const {  // from 0
        float u = (x - offset) * inverse;
        u = u < float(low) ? float(low) : u > float(high) ? float(high) : u;
        return int32_t(std::rint(u)) - low;
    }
};

template <Activation kind>
void activated_by(const Grid& grid, int rows, int columns, const float* x, int stride, uint8_t* to, int64_t row) {
    for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) to[i * row + j] = uint8_t(grid.code(activate<kind>(x[i * stride + j])));
}

// The codes of an activation's outputs, for a tile of its inputs.
template <class... Tile>
void activated(Activation kind, const Grid& grid, Tile... tile) {
    switch (kind) {
        case Activation::gelu: return activated_by<Activation::gelu>(grid, tile...);
        case Activation::gelu_tanh: return activated_by<Activation::gelu_tanh>(grid, tile...);
        case Activation::quick_gelu: return activated_by<Activation::quick_gelu>(grid, tile...);
        case Activation::silu: return activated_by<Activation::silu>(grid, tile...);
        case Activation::relu: return activated_by<Activation::relu>(grid, tile...);
    }
}

// ------------------------------------------------------------------------------------------------------------ products

// A right operand (k, n) in panels, with the sums that correct for left operands stored from 0.
struct Panels {
    int n = 0, k = 0, groups = 0, most = 0, narrow = 0;
    Buffer<int8_t> bytes;
    Buffer<int32_t> start;
};

struct Linear {
    int n = 0, k = 0, segments = 1;
    Grid grid[64];  // of the input: one, or one for each segment of k
    std::vector<Panels> panels;
    Buffer<float> scale, bias;  // scale: (segments, n padded)
    int padded = 0;
};

int round_up(int n, int to) { return (n + to - 1) / to * to; }

// What sums of a left operand start at: low * sum(w) for bytes stored from 0; the wide AVX2 form takes 128 off each byte.
int32_t beginning(int low, int narrow, int32_t sum) { return (low + (narrow == kWide ? 128 : 0)) * sum; }

void fill_panels(Panels& to, const Form& form, int n, int k, const int8_t* w, int64_t row, int low, int most_left) {
    const int nr = form.columns, columns = round_up(n, nr);
    to.n = n, to.k = k, to.groups = (k + 3) / 4, to.most = 0;
    to.bytes.assign(size_t(columns) * to.groups * 4, 0);
    to.start.assign(columns, 0);
    for (int j = 0; j < n; ++j) {
        int32_t sum = 0;
        for (int i = 0; i < k; ++i) {
            const int8_t value = w[j * row + i];
            to.bytes[(size_t(j / nr) * to.groups + i / 4) * nr * 4 + (j % nr) * 4 + i % 4] = value;
            sum += value;
            to.most = std::max(to.most, std::abs(int(value)));
        }
        to.start[j] = sum;
    }
    to.narrow = form.narrow(most_left, to.most);
    for (int32_t& start : to.start) start = beginning(low, to.narrow, start);
}

// Even parts of at most `most` of a number of rows.
int even(int rows, int most) {
    const int parts = (rows + most - 1) / most;
    return (rows + parts - 1) / parts;
}

// All products of m rows with panels: `use(row, rows, column, columns, sums)` gets tile after tile.
template <class Use>
void multiply(const Form& form, int m, const uint8_t* a, int64_t lda, const Panels& w, Use&& use) {
    alignas(64) int32_t sums[kMostRows * kMostColumns];
    const int nr = form.columns, step = even(m, form.rows);
    for (int j = 0; j < w.n; j += nr) {
        const int8_t* panel = w.bytes.data() + size_t(j / nr) * w.groups * nr * 4;
        for (int i = 0; i < m; i += step) {
            const int rows = std::min(step, m - i);
            form.tile(rows, a + i * lda, lda, panel, w.groups, w.narrow, w.start.data() + j, sums);
            use(i, rows, j, std::min(nr, w.n - j), sums);
        }
    }
}

struct Norm {
    bool there = false, centred = true;  // centred: LayerNorm; else RmsNorm, which takes no mean off
    float epsilon = 0;
    Buffer<float> weight, bias;
};

struct Head {
    Grid query, key, value, probs, output;
};

struct Block {
    Norm norm1, norm2, query_norm, key_norm;
    Linear qkv, proj, fc1, fc2;
    std::vector<Head> heads;
    int log_steps = 0;  // of the probabilities: 0 for a uniform grid, else levels per octave
    float factor = 1;
    // Per column of qkv: how its output becomes codes.
    Buffer<float> inverse, offset, low, high, shift;
};

struct Scratch {
    Buffer<uint8_t> codes, hidden, probs, second;
    Buffer<float> rows, scores, sums, projected;
    Panels keys, values;
    Buffer<float> key_add;
};

class Model {
  public:
    int channels = 0, side_y = 0, side_x = 0, patch_y = 0, patch_x = 0;  // images and patches
    int dim = 0, heads = 0, head_dim = 0, hidden = 0, tokens = 0, prefix = 0, classes = 0;
    int pool = 0;  // 0: the first token; 1: the mean of those behind the prefix; 2: the mean of all
    const Form* form = nullptr;
    Activation activation = Activation::gelu;
    Linear embed, head;
    Norm norm_pre, norm, fc_norm;
    Buffer<float> added;  // (tokens, dim): what every image's tokens start from
    std::vector<Block> blocks;
    std::unique_ptr<Team> team;
    std::vector<Scratch> scratch;
    Buffer<float> stream;     // (B * tokens, dim)
    Buffer<uint8_t> qkv;      // (B * tokens, 3 * dim)
    Buffer<uint8_t> merged;   // (B * tokens, dim)

    void forward(const float* images, int batch, float* logits);

  private:
    static constexpr int kChunk = 36;
    void normalise(const float* x, const Norm& norm, float* to) const { normalise(x, norm, to, dim); }
    static void normalise(const float* x, const Norm& norm, float* to, int n);
    void store_qkv(const Block& block, int token, int column, int columns, const float* values);
    void encode(const float* x, int n, const Linear& layer, uint8_t* to) const;
    void embed_patches(const float* images, int first, int last, Scratch& own);
    void project_qkv(const Block& block, int first, int last, Scratch& own);
    void finish_block(const Block& block, int first, int last, Scratch& own);
    void attend(const Block& block, int image, int head, int first, int last, Scratch& own);
    void classify(int image, float* logits, Scratch& own);
    template <class Use>
    void linear(const Linear& layer, int m, const uint8_t* a, int64_t lda, Scratch& own, Use&& use);
};

// The outputs of a layer for m rows, tile after tile in float: `use(row, rows, column, columns, values, stride)`.
template <class Use>
void Model::linear(const Linear& layer, int m, const uint8_t* a, int64_t lda, Scratch& own, Use&& use) {
    alignas(64) float values[kMostRows * kMostColumns];
    const int nr = form->columns;
    if (layer.segments == 1) {
        const float *scale = layer.scale.data(), *bias = layer.bias.data();
        multiply(*form, m, a, lda, layer.panels[0],
                 [&](int row, int rows, int column, int columns, const int32_t* sums) {
                     for (int i = 0; i < rows; ++i)
                         for (int j = 0; j < nr; ++j)
                             values[i * nr + j] = float(sums[i * nr + j]) * scale[column + j] + bias[column + j];
                     use(row, rows, column, columns, values, nr);
                 });
        return;
    }
    const int n = layer.padded, k = layer.k / layer.segments;
    own.sums.resize(size_t(m) * n);
    float* total = own.sums.data();
    for (int i = 0; i < m; ++i) std::copy_n(layer.bias.data(), n, total + size_t(i) * n);
    for (int s = 0; s < layer.segments; ++s) {
        const float* scale = layer.scale.data() + size_t(s) * n;
        multiply(*form, m, a + s * k, lda, layer.panels[s],
                 [&](int row, int rows, int column, int, const int32_t* sums) {
                     for (int i = 0; i < rows; ++i)
                         for (int j = 0; j < nr; ++j)
                             total[size_t(row + i) * n + column + j] += float(sums[i * nr + j]) * scale[column + j];
                 });
    }
    use(0, m, 0, layer.n, total, n);
}

void Model::normalise(const float* x, const Norm& norm, float* to, int n) {
    // Sums by lane: the order does not depend on how wide a vector is.
    float lane[16] = {}, mean = 0, variance = 0;
    int j = 0;
    if (norm.centred) {
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
    const float factor = 1.0f / std::sqrt(variance / float(n) + norm.epsilon);
    const float *weight = norm.weight.data(), *bias = norm.bias.data();
    for (j = 0; j < n; ++j) to[j] = (x[j] - mean) * factor * weight[j] + bias[j];
}

void Model::encode(const float* x, int n, const Linear& layer, uint8_t* to) const {
    const Grid grid = layer.grid[0];
    for (int j = 0; j < n; ++j) to[j] = uint8_t(grid.code(x[j]));
}

void Model::embed_patches(const float* images, int first, int last, Scratch& own) {
    const int across = side_x / patch_x, patches = tokens - prefix, k = embed.k, lda = round_up(k, 4);
    const Grid grid = embed.grid[0];
    for (int begin = first; begin < last; begin += kChunk) {
        const int end = std::min(last, begin + kChunk);
        own.hidden.assign(size_t(kChunk) * lda, 0);
        for (int p = begin; p < end; ++p) {
            const float* image = images + size_t(p / patches) * channels * side_y * side_x;
            const int place = p % patches, top = place / across * patch_y, left = place % across * patch_x;
            uint8_t* to = own.hidden.data() + size_t(p - begin) * lda;
            for (int c = 0; c < channels; ++c)
                for (int y = 0; y < patch_y; ++y, to += patch_x) {
                    const float* from = image + (size_t(c) * side_y + top + y) * side_x + left;
                    for (int x = 0; x < patch_x; ++x) to[x] = uint8_t(grid.code(from[x]));
                }
        }
        linear(embed, end - begin, own.hidden.data(), lda, own,
               [&](int row, int rows, int column, int columns, const float* values, int stride) {
                   for (int i = 0; i < rows; ++i) {
                       const int p = begin + row + i, token = prefix + p % patches;
                       float* to = stream.data() + (size_t(p / patches) * tokens + token) * dim + column;
                       const float* add = added.data() + size_t(token) * dim + column;
                       for (int j = 0; j < columns; ++j) to[j] = values[i * stride + j] + add[j];
                   }
               });
    }
}

void Model::project_qkv(const Block& block, int first, int last, Scratch& own) {
    const int lda = round_up(dim, 4), count = last - first;
    own.codes.resize(size_t(count) * lda);
    own.rows.resize(std::max(dim, hidden));
    for (int i = 0; i < count; ++i) {
        normalise(stream.data() + size_t(first + i) * dim, block.norm1, own.rows.data());
        encode(own.rows.data(), dim, block.qkv, own.codes.data() + size_t(i) * lda);
    }
    if (!block.query_norm.there && !block.key_norm.there) {
        linear(block.qkv, count, own.codes.data(), lda, own,
               [&](int row, int rows, int column, int columns, const float* values, int stride) {
                   for (int i = 0; i < rows; ++i)
                       store_qkv(block, first + row + i, column, columns, values + i * stride);
               });
        return;
    }
    own.projected.resize(size_t(count) * 3 * dim);
    linear(block.qkv, count, own.codes.data(), lda, own,
           [&](int row, int rows, int column, int columns, const float* values, int stride) {
               for (int i = 0; i < rows; ++i)
                   std::copy_n(values + i * stride, columns, own.projected.data() + size_t(row + i) * 3 * dim + column);
           });
    for (int i = 0; i < count; ++i) {
        float* row = own.projected.data() + size_t(i) * 3 * dim;
        for (const Norm* norm : {&block.query_norm, &block.key_norm}) {
            float* part = row + (norm == &block.key_norm ? dim : 0);
            for (int h = 0; norm->there && h < heads; ++h) {
                normalise(part + h * head_dim, *norm, own.rows.data(), head_dim);
                std::copy_n(own.rows.data(), head_dim, part + h * head_dim);
            }
        }
        store_qkv(block, first + i, 0, 3 * dim, row);
    }
}

// Codes of a token's outputs of qkv, from a column on: queries from 0 on, keys and values as they are.
void Model::store_qkv(const Block& block, int token, int column, int columns, const float* values) {
    const float *inverse = block.inverse.data() + column, *offset = block.offset.data() + column,
                *low = block.low.data() + column, *high = block.high.data() + column,
                *shift = block.shift.data() + column;
    uint8_t* to = qkv.data() + size_t(token) * 3 * dim + column;
    for (int j = 0; j < columns; ++j) {
        float u = (values[j] - offset[j]) * inverse[j];
        u = u < low[j] ? low[j] : u > high[j] ? high[j] : u;
        to[j] = uint8_t(int32_t(std::rint(u) - shift[j]));
    }
}

void Model::finish_block(const Block& block, int first, int last, Scratch& own) {
    const int lda = round_up(dim, 4), wide = round_up(hidden, 4), count = last - first;
    auto add_to_stream = [&](int row, int rows, int column, int columns, const float* values, int stride) {
        for (int i = 0; i < rows; ++i) {
            float* to = stream.data() + size_t(first + row + i) * dim + column;
            for (int j = 0; j < columns; ++j) to[j] += values[i * stride + j];
        }
    };
    linear(block.proj, count, merged.data() + size_t(first) * dim, dim, own, add_to_stream);
    own.codes.resize(size_t(count) * lda);
    own.rows.resize(std::max(dim, hidden));
    for (int i = 0; i < count; ++i) {
        normalise(stream.data() + size_t(first + i) * dim, block.norm2, own.rows.data());
        encode(own.rows.data(), dim, block.fc1, own.codes.data() + size_t(i) * lda);
    }
    own.hidden.resize(size_t(count) * wide);
    const Grid grid = block.fc2.grid[0];
    linear(block.fc1, count, own.codes.data(), lda, own,
           [&](int row, int rows, int column, int columns, const float* values, int stride) {
               uint8_t* to = own.hidden.data() + size_t(row) * wide + column;
               activated(activation, grid, rows, columns, values, stride, to, int64_t(wide));
           });
    linear(block.fc2, count, own.hidden.data(), wide, own, add_to_stream);
}

// The largest of n integers of both signs, a row each.
int largest(const int8_t* x, int rows, int n, int64_t row) {
    int least = 0, most = 0;
    for (int i = 0; i < rows; ++i)
        for (int t = 0; t < n; ++t) {
            const int value = x[i * row + t];
            least = value < least ? value : least;
            most = value > most ? value : most;
        }
    return std::max(most, -least);
}

// One head of one image, for the queries from `first` to `last`.
void Model::attend(const Block& block, int image, int head, int first, int last, Scratch& own) {
    const Head& grids = block.heads[head];
    const int nr = form->columns, d = head_dim, groups = d / 4, count = round_up(tokens, 4);
    const int64_t row = 3 * int64_t(dim);
    const uint8_t* base = qkv.data() + size_t(image) * tokens * row + size_t(head) * d;
    const int8_t *keys = (const int8_t*)(base + dim), *values = (const int8_t*)(base + 2 * dim);
    const int columns = round_up(tokens, nr);

    // Keys as the right operand of the scores, (d, tokens); those of β_q are all that offsets add within a row.
    Panels& right = own.keys;
    right.n = tokens, right.k = d, right.groups = groups;
    right.bytes.resize(size_t(columns) * d);
    right.start.resize(columns);
    own.key_add.resize(columns);
    const float score_scale = grids.query.scale * grids.key.scale * block.factor;
    const float add_scale = grids.query.offset * grids.key.scale * block.factor;
    for (int j = 0; j < tokens; ++j) {
        int32_t sum = 0;
        int8_t* to = right.bytes.data() + size_t(j / nr) * groups * nr * 4 + (j % nr) * 4;
        for (int g = 0; g < groups; ++g) std::memcpy(to + size_t(g) * nr * 4, keys + j * row + 4 * g, 4);
        for (int t = 0; t < d; ++t) sum += keys[j * row + t];
        right.start[j] = sum;
        own.key_add[j] = add_scale * float(sum);
    }
    right.most = form->one_way ? 0 : largest(keys, tokens, d, row);
    right.narrow = form->narrow(grids.query.high - grids.query.low, right.most);
    for (int j = 0; j < tokens; ++j) right.start[j] = beginning(grids.query.low, right.narrow, right.start[j]);
    // Columns behind the last token have probability 0, so that what follows runs over whole vectors.
    for (int j = tokens; j < columns; ++j) right.start[j] = 0, own.key_add[j] = -1e30f;

    // Values as the right operand of the weighted sums, (tokens, d).
    const int value_columns = round_up(d, nr);
    Panels& weighted = own.values;
    weighted.n = d, weighted.k = tokens, weighted.groups = count / 4;
    weighted.bytes.assign(size_t(value_columns) * count, 0);
    weighted.start.assign(value_columns, 0);
    alignas(64) int32_t value_sums[256] = {};
    static const int8_t nothing[256] = {};
    for (int i = 0; i < tokens; i += 4) {
        const int8_t* from[4];
        for (int r = 0; r < 4; ++r) from[r] = i + r < tokens ? values + (i + r) * row : nothing;
        for (int begin = 0; begin < d; begin += nr) {
            auto* to = (uint32_t*)(weighted.bytes.data() + (size_t(begin / nr) * weighted.groups + i / 4) * nr * 4);
            for (int t = 0; t < std::min(nr, d - begin); ++t) {
                const int c = begin + t;
                to[t] = uint32_t(uint8_t(from[0][c])) | uint32_t(uint8_t(from[1][c])) << 8 |
                        uint32_t(uint8_t(from[2][c])) << 16 | uint32_t(uint8_t(from[3][c])) << 24;
            }
        }
        for (int r = 0; r < 4; ++r)
            for (int t = 0; t < d; ++t) value_sums[t] += from[r][t];
    }
    weighted.most = form->one_way ? 0 : largest(values, tokens, d, row);
    const int probs_low = block.log_steps ? 0 : grids.probs.low;
    weighted.narrow = form->narrow(block.log_steps ? 128 : grids.probs.high - grids.probs.low, weighted.most);
    for (int t = 0; t < d; ++t) weighted.start[t] = beginning(probs_low, weighted.narrow, value_sums[t]);

    const int step = even(last - first, form->rows);
    own.scores.resize(size_t(form->rows) * columns);
    own.probs.resize(size_t(form->rows) * columns), own.second.resize(size_t(form->rows) * columns);
    const Grid output = grids.output;
    const float highest = float(grids.probs.high);
    for (int begin = first; begin < last; begin += step) {
        const int m = std::min(step, last - begin);
        alignas(64) float greatest[kMostRows][16];
        std::fill_n(greatest[0], kMostRows * 16, -1e30f);
        multiply(*form, m, base + begin * row, row, right,
                 [&](int r, int rows, int column, int, const int32_t* sums) {
                     const float* add = own.key_add.data() + column;
                     for (int i = 0; i < rows; ++i) {
                         float *to = own.scores.data() + size_t(r + i) * columns + column, *most = greatest[r + i];
                         for (int j = 0; j < nr; j += 16)
                             for (int t = 0; t < 16; ++t) {
                                 const float score = float(sums[i * nr + j + t]) * score_scale + add[j + t];
                                 to[j + t] = score;
                                 most[t] = score > most[t] ? score : most[t];
                             }
                     }
                 });
        alignas(64) float prob_sums[kMostRows];
        for (int i = 0; i < m; ++i) {
            float* s = own.scores.data() + size_t(i) * columns;
            uint8_t *p = own.probs.data() + size_t(i) * columns, *second = own.second.data() + size_t(i) * columns;
            float lane[16] = {}, most = s[0], total = 0;
            for (float value : greatest[i]) most = value > most ? value : most;
            if (!block.log_steps) {
                for (int j = 0; j < columns; j += 16)
                    for (int t = 0; t < 16; ++t) {
                        s[j + t] = exponential(s[j + t] - most);
                        lane[t] += s[j + t];
                    }
                for (float value : lane) total += value;
                Grid grid = grids.probs;
                grid.offset *= total, grid.inverse /= total;
                for (int j = 0; j < columns; ++j) p[j] = uint8_t(grid.code(s[j]));
                int32_t codes = 0;
                for (int j = 0; grids.value.offset != 0 && j < tokens; ++j) codes += p[j];
                prob_sums[i] = float(codes + tokens * grid.low);
                continue;
            }
            // Levels scale * 2^(-q / steps), the last of them 0; q from the exponent, not from the exponential.
            for (int j = 0; j < columns; j += 16)
                for (int t = 0; t < 16; ++t) lane[t] += exponential(s[j + t] - most);
            for (float value : lane) total += value;
            const float steps = float(block.log_steps), level_of_one = std::log2(total * grids.probs.scale);
            // log-sqrt2: even codes and odd ones. log2: the eight largest levels and the others.
            const int half = block.log_steps == 2 ? 1 : 8, shift = block.log_steps == 2 ? 1 : 0;
            for (int j = 0; j < columns; ++j) {
                float q = steps * (level_of_one - (s[j] - most) * 1.44269504f);
                q = q < 0 ? 0 : q > highest ? highest : q;
                q = std::rint(q);
                const int32_t code = int32_t(q), level = q < highest ? 128 >> ((code >> shift) & 7) : 0;
                p[j] = uint8_t(code & half ? 0 : level);
                second[j] = uint8_t(code & half ? level : 0);
            }
        }
        auto finish = [&](int r, int rows, int column, int cols, const float* y, int stride) {
            for (int i = 0; i < rows; ++i) {
                uint8_t* to = merged.data() + (size_t(image) * tokens + begin + r + i) * dim + size_t(head) * d + column;
                for (int t = 0; t < cols; ++t) to[t] = uint8_t(output.code(y[i * stride + t]));
            }
        };
        alignas(64) float y[kMostRows * kMostColumns];
        if (!block.log_steps) {
            const float scale = grids.probs.scale * grids.value.scale;
            const float by_probs = grids.probs.scale * grids.value.offset, by_value = grids.probs.offset * grids.value.scale;
            const float constant = float(tokens) * grids.probs.offset * grids.value.offset;
            multiply(*form, m, own.probs.data(), columns, weighted,
                     [&](int r, int rows, int column, int cols, const int32_t* sums) {
                         for (int i = 0; i < rows; ++i) {
                             const float add = prob_sums[r + i] * by_probs + constant;
                             for (int t = 0; t < nr; ++t)
                                 y[i * nr + t] = float(sums[i * nr + t]) * scale + add + by_value * float(value_sums[column + t]);
                         }
                         finish(r, rows, column, cols, y, nr);
                     });
            continue;
        }
        // Even and odd codes (log-sqrt2), or large and small levels (log2), are two operands of powers of two.
        const float one = grids.probs.scale * grids.value.scale / 128.0f;
        const float other = block.log_steps == 2 ? one * 0.70710678f : one / 256.0f;
        own.rows.resize(std::max(size_t(kMostRows) * value_columns, size_t(std::max(dim, hidden))));
        float* both = own.rows.data();
        multiply(*form, m, own.probs.data(), columns, weighted,
                 [&](int r, int rows, int column, int, const int32_t* sums) {
                     for (int i = 0; i < rows; ++i)
                         for (int t = 0; t < nr; ++t)
                             both[size_t(r + i) * value_columns + column + t] = float(sums[i * nr + t]) * one;
                 });
        multiply(*form, m, own.second.data(), columns, weighted,
                 [&](int r, int rows, int column, int cols, const int32_t* sums) {
                     for (int i = 0; i < rows; ++i)
                         for (int t = 0; t < nr; ++t)
                             both[size_t(r + i) * value_columns + column + t] += float(sums[i * nr + t]) * other;
                     finish(r, rows, column, cols, both + size_t(r) * value_columns + column, value_columns);
                 });
    }
}

void Model::classify(int image, float* logits, Scratch& own) {
    own.rows.resize(std::max(std::max(dim, hidden), 2 * dim));
    float *pooled = own.rows.data(), *row = pooled + dim;
    const float* x = stream.data() + size_t(image) * tokens * dim;
    auto normed = [&](int token) {
        if (!norm.there) return x + size_t(token) * dim;
        normalise(x + size_t(token) * dim, norm, row);
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
    if (fc_norm.there) {
        normalise(pooled, fc_norm, row);
        std::copy_n(row, dim, pooled);
    }
    own.codes.resize(round_up(dim, 4));
    encode(pooled, dim, head, own.codes.data());
    linear(head, 1, own.codes.data(), dim, own, [&](int, int, int column, int columns, const float* values, int) {
        std::copy_n(values, columns, logits + size_t(image) * classes + column);
    });
}

void Model::forward(const float* images, int batch, float* logits) {
    const size_t rows = size_t(batch) * tokens;
    stream.resize(rows * dim), merged.resize(rows * dim), qkv.resize(rows * 3 * dim);
    const int patches = (tokens - prefix) * batch, threads = team->size();
    // Queries of a head are split where there are too few heads for an even share.
    int parts = 1;
    while (batch * heads * parts < 3 * threads && parts < 8) ++parts;
    const int items = batch * heads * parts;
    std::vector<std::atomic<int>> next(blocks.size() + 1);
    for (auto& counter : next) counter = 0;
    team->run([&](int thread) {
        Scratch& own = scratch[thread];
        auto share = [&](int count, int part) { return int(int64_t(count) * part / threads); };
        for (int image = share(batch, thread); image < share(batch, thread + 1); ++image)
            std::copy_n(added.data(), size_t(prefix) * dim, stream.data() + size_t(image) * tokens * dim);
        embed_patches(images, share(patches, thread), share(patches, thread + 1), own);
        team->barrier();
        const int first = share(int(rows), thread), last = share(int(rows), thread + 1);
        const int step = last > first ? even(last - first, kChunk) : kChunk;
        for (size_t index = 0; index <= blocks.size(); ++index) {
            for (int begin = first; begin < last; begin += step) {
                const int end = std::min(last, begin + step);
                if (index == 0) {
                    if (norm_pre.there) {
                        own.rows.resize(std::max(dim, hidden));
                        for (int i = begin; i < end; ++i) {
                            normalise(stream.data() + size_t(i) * dim, norm_pre, own.rows.data());
                            std::copy_n(own.rows.data(), dim, stream.data() + size_t(i) * dim);
                        }
                    }
                } else {
                    finish_block(blocks[index - 1], begin, end, own);
                }
                if (index < blocks.size()) project_qkv(blocks[index], begin, end, own);
            }
            team->barrier();
            if (index == blocks.size()) break;
            for (int item; (item = next[index].fetch_add(1, std::memory_order_relaxed)) < items;) {
                const int part = item % parts, head = item / parts % heads, image = item / parts / heads;
                attend(blocks[index], image, head, int(int64_t(tokens) * part / parts),
                       int(int64_t(tokens) * (part + 1) / parts), own);
            }
            team->barrier();
        }
        for (int image = share(batch, thread); image < share(batch, thread + 1); ++image) classify(image, logits, own);
    });
}

}  // namespace qvit

// -------------------------------------------------------------------------------------------------------- C interface

using namespace qvit;

namespace {

thread_local std::string problem;

struct Handle {
    Model model;
    int threads = 1;
    std::mutex busy;
#if QVIT_FORKS
    pid_t process = getpid();
#endif

    // In a child of `fork` the threads are not there, and whoever held the lock is not either.
    void after_fork() {
#if QVIT_FORKS
        if (process == getpid()) return;
        new (&busy) std::mutex;
        model.team.release();
        model.team = std::make_unique<Team>(threads);
        process = getpid();
#endif
    }
};

Linear* layer_of(Model& model, int kind, int block) {
    if (kind == 0) return &model.embed;
    if (kind == 5) return &model.head;
    if (block < 0 || block >= int(model.blocks.size())) return nullptr;
    Block& own = model.blocks[block];
    Linear* found[] = {nullptr, &own.qkv, &own.proj, &own.fc1, &own.fc2};
    return kind > 0 && kind < 5 ? found[kind] : nullptr;
}

Norm* norm_of(Model& model, int kind, int block) {
    if (kind == 2) return &model.norm_pre;
    if (kind == 3) return &model.norm;
    if (kind == 4) return &model.fc_norm;
    if (block < 0 || block >= int(model.blocks.size())) return nullptr;
    Block& own = model.blocks[block];
    Norm* found[] = {&own.norm1, &own.norm2, nullptr, nullptr, nullptr, &own.query_norm, &own.key_norm};
    return kind >= 0 && kind < 7 ? found[kind] : nullptr;
}

Grid grid_from(const float* numbers) {
    Grid grid;
    grid.scale = numbers[0], grid.inverse = 1.0f / numbers[0], grid.offset = numbers[1];
    grid.low = int(numbers[2]), grid.high = int(numbers[3]);
    return grid;
}

template <class F>
int guarded(F&& work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        problem = "out of memory";
    } catch (const std::exception& error) {
        problem = error.what();
    }
    return 1;
}

}  // namespace

extern "C" {

// What went wrong in this thread's last call that returned 1.
const char* qvit_error() { return problem.c_str(); }

int qvit_form_count() {
    int count;
    forms(count);
    return count;
}

const char* qvit_form_name(int form) {
    int count;
    const Form* found = forms(count);
    return form >= 0 && form < count ? found[form].name : nullptr;
}

// sizes: channels, side_y, side_x, patch_y, patch_x, dim, heads, hidden, tokens, prefix, classes, pool, depth, activation
void* qvit_create(const int* sizes, const float* added, int form, int threads) {
    Handle* handle = nullptr;
    const int failed = guarded([&] {
        handle = new Handle;
        Model& model = handle->model;
        int count;
        model.form = forms(count) + form;
        model.channels = sizes[0], model.side_y = sizes[1], model.side_x = sizes[2];
        model.patch_y = sizes[3], model.patch_x = sizes[4], model.dim = sizes[5], model.heads = sizes[6];
        model.head_dim = model.dim / model.heads, model.hidden = sizes[7], model.tokens = sizes[8];
        model.prefix = sizes[9], model.classes = sizes[10], model.pool = sizes[11];
        model.blocks.resize(sizes[12]);
        model.activation = Activation(sizes[13]);
        model.added.assign(added, added + size_t(model.tokens) * model.dim);
        handle->threads = threads;
        model.team = std::make_unique<Team>(threads);
        model.scratch.resize(threads);
    });
    if (!failed) return handle;
    delete handle;
    return nullptr;
}

// kind: 0 patch embedding, 1 qkv, 2 proj, 3 fc1, 4 fc2, 5 head. codes (n, k), scales (segments, n), grids (segments, 4).
int qvit_set_linear(void* to, int kind, int block, int n, int k, int segments, const int8_t* codes, const float* scales,
                    const float* bias, const float* grids) {
    return guarded([&] {
        Model& model = static_cast<Handle*>(to)->model;
        Linear* layer = layer_of(model, kind, block);
        if (!layer || segments < 1 || segments > 64 || k % segments) throw std::runtime_error("no such layer");
        layer->n = n, layer->k = k, layer->segments = segments, layer->padded = round_up(n, kMostColumns);
        layer->bias.assign(layer->padded, 0);
        std::copy_n(bias, n, layer->bias.data());
        layer->scale.assign(size_t(segments) * layer->padded, 0);
        layer->panels.resize(segments);
        for (int s = 0; s < segments; ++s) {
            Grid& grid = layer->grid[s] = grid_from(grids + 4 * s);
            std::copy_n(scales + size_t(s) * n, n, layer->scale.data() + size_t(s) * layer->padded);
            const int part = k / segments;
            fill_panels(layer->panels[s], *model.form, n, part, codes + s * part, k, grid.low, grid.high - grid.low);
        }
    });
}

// kind: 0 norm1, 1 norm2, 2 norm_pre, 3 norm, 4 fc_norm, 5 q_norm, 6 k_norm; centred: LayerNorm, else RmsNorm
int qvit_set_norm(void* to, int kind, int block, int n, const float* weight, const float* bias, float epsilon,
                  int centred) {
    return guarded([&] {
        Norm* norm = norm_of(static_cast<Handle*>(to)->model, kind, block);
        if (!norm) throw std::runtime_error("no such norm");
        norm->there = true, norm->centred = centred, norm->epsilon = epsilon;
        norm->weight.assign(weight, weight + n);
        norm->bias.assign(bias, bias + n);
    });
}

// grids (heads, 5, 4): query, key, value, probs, output; log_steps: 0, or levels per octave of the probabilities
int qvit_set_heads(void* to, int block, const float* grids, int log_steps, float factor) {
    return guarded([&] {
        Model& model = static_cast<Handle*>(to)->model;
        Block& own = model.blocks.at(block);
        own.log_steps = log_steps, own.factor = factor;
        own.heads.resize(model.heads);
        const int columns = round_up(3 * model.dim, kMostColumns);
        for (Buffer<float>* each : {&own.inverse, &own.offset, &own.low, &own.high, &own.shift}) each->assign(columns, 0);
        for (int h = 0; h < model.heads; ++h) {
            Head& head = own.heads[h];
            Grid* parts[] = {&head.query, &head.key, &head.value, &head.probs, &head.output};
            for (int p = 0; p < 5; ++p) *parts[p] = grid_from(grids + (size_t(h) * 5 + p) * 4);
            for (int p = 0; p < 3; ++p)
                for (int t = 0; t < model.head_dim; ++t) {
                    const int c = p * model.dim + h * model.head_dim + t;
                    own.inverse[c] = parts[p]->inverse, own.offset[c] = parts[p]->offset;
                    own.low[c] = float(parts[p]->low), own.high[c] = float(parts[p]->high);
                    own.shift[c] = p == 0 ? float(parts[p]->low) : 0.0f;
                }
        }
    });
}

int qvit_run(void* model, const float* images, int batch, float* logits) {
    return guarded([&] {
        Handle& handle = *static_cast<Handle*>(model);
        handle.after_fork();
        std::lock_guard<std::mutex> lock(handle.busy);
        handle.model.forward(images, batch, logits);
    });
}

void qvit_free(void* model) {
    auto* handle = static_cast<Handle*>(model);
    handle->after_fork();
    delete handle;
}

// One product by itself: out (m, n) of bytes a (m, k), stored from 0 on a grid from `low`, and w (n, k).
int qvit_multiply(int form, int m, int n, int k, const uint8_t* a, int low, int most_left, const int8_t* w, int32_t* out) {
    return guarded([&] {
        int count;
        const Form& own = forms(count)[form];
        const int lda = round_up(k, 4);
        Buffer<uint8_t> rows(size_t(m) * lda);
        for (int i = 0; i < m; ++i) std::copy_n(a + size_t(i) * k, k, rows.data() + size_t(i) * lda);
        Panels panels;
        fill_panels(panels, own, n, k, w, k, low, most_left);
        multiply(own, m, rows.data(), lda, panels, [&](int row, int tile, int column, int columns, const int32_t* sums) {
            for (int i = 0; i < tile; ++i) std::copy_n(sums + i * own.columns, columns, out + size_t(row + i) * n + column);
        });
    });
}

}  // extern "C"
