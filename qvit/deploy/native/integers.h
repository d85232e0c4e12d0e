// LayerNorm, softmax and GELU on integers. Included by lanes.h, once per instruction set.
// `qvit/nonlinear/` defines each form, with the ranges that keep these sums and products from overflowing; here they are
// equal bit for bit. A form takes and gives numbers in fixed point: round(x * 2^bits), clamped to ±most.
//
//   normalize   a row of 12 fraction bits; without weight and bias 10
//   soften      scores of 10 fraction bits; probabilities of 15
//   gate        of a GELU of 10 fraction bits: 15, from a table, for it depends on few of them

constexpr int kMostNormed = 4096, kMostGated = 1 << 14;  // kMostNormed: see network.h
constexpr float kScoreUnit = 1024.0f, kProbability = 1.0f / 32768.0f;

QVIT_INLINE int bits_of(uint64_t n) { return n ? 64 - __builtin_clzll(n) : 0; }

QVIT_INLINE void fix(const float* x, int n, float by, float most, int32_t* to) {
    for (int j = 0; j < n; ++j) {
        const float value = lesser_of(greater_of(x[j] * by, -most), most);
#if defined(QVIT_FMA)
        to[j] = int32_t(nearest(value));
#else
        to[j] = int32_t(std::lrint(value));
#endif
    }
}

// ------------------------------------------------------------------------------------------------------- LayerNorm

// floor(sqrt(n)) for i-bert, by iterations that end where it stops falling; that or one more for i-vit, by ten of them.
inline int64_t root_of(Integer form, int64_t n) {
    if (n < 1) return 0;
    const int bits = bits_of(uint64_t(n));
    int64_t root = int64_t(1) << (form == Integer::ibert ? (bits + 1) >> 1 : bits >> 1);
    for (int step = 0; step < (form == Integer::ibert ? 8 : 10); ++step) {
        const int64_t next = (root + n / root) >> 1;
        if (form == Integer::ibert && next >= root) break;
        root = next;
    }
    return root;
}

inline void normalize(Integer form, int32_t* y, int n) {
    int64_t sum = 0, squares = 0;
    for (int j = 0; j < n; ++j) sum += y[j];
    const int64_t twice = 2 * sum + n, count = 2 * int64_t(n);
    const int32_t mean = int32_t(twice / count - (twice % count < 0));
    for (int j = 0; j < n; ++j) y[j] -= mean;
    for (int j = 0; j < n; ++j) squares += int64_t(y[j]) * y[j];
    const bool bert = form == Integer::ibert;
    const int64_t root = std::max<int64_t>(1, root_of(form, bert ? squares / n : std::max<int64_t>(1, squares)));
    const int64_t one = bert ? 1 << 14 : std::llrint(std::sqrt(double(n)) * 1024.0);
    const int length = bits_of(uint64_t(root)), shift = length + (bert ? 4 : 0);
    const int64_t half = int64_t(1) << (shift - 1);
    const int32_t factor = int32_t((one << length) / root);
    for (int j = 0; j < n; ++j) y[j] = int32_t((int64_t(y[j]) * factor + half) >> shift);
}

// Weight and bias of a LayerNorm as integers, and what its codes count.
struct Affine {
    std::vector<int32_t> weight;
    std::vector<int64_t> bias;
    float unit = 0;

    Affine() = default;
    Affine(const std::vector<float>& by, const std::vector<float>& add) {
        float most = 0;
        for (float value : by) most = std::max(most, std::fabs(value));
        int exponent = 0;
        (void)std::frexp(most, &exponent);
        const int shift = 15 - exponent;
        constexpr double kMostBias = 1099511627776.0;  // 2^40
        weight.resize(by.size()), bias.resize(add.size());
        for (size_t j = 0; j < by.size(); ++j) weight[j] = int32_t(std::llrint(std::ldexp(double(by[j]), shift)));
        for (size_t j = 0; j < add.size(); ++j) {
            const double value = std::nearbyint(std::ldexp(double(add[j]), shift + 10));
            bias[j] = int64_t(value < -kMostBias ? -kMostBias : value > kMostBias ? kMostBias : value);
        }
        unit = float(std::ldexp(1.0, -shift - 2));
    }
    // n values of the row, whose channels begin at `first`.
    void operator()(const int32_t* y, int n, int first, float* to) const {
        const int32_t* by = weight.data() + first;
        const int64_t* add = bias.data() + first;
        constexpr int64_t kMost = 1 << 23;
        for (int j = 0; j < n; ++j) {
            const int64_t code = (int64_t(y[j]) * by[j] + add[j] + 128) >> 8;
            to[j] = float(int32_t(code < -kMost ? -kMost : code > kMost ? kMost : code)) * unit;
        }
    }
};

// --------------------------------------------------------------------------------------------------------- softmax

// exp(x) for x in [-2^15, 0] of 10 fraction bits, up to 2^15.
template <bool bert>
QVIT_INLINE int32_t exponential(int32_t x) {
    if (bert) {
        const int32_t z = -x / 710, p = x + 710 * z + 1385, shift = 14 + z;
        return ((p * p + 1006166) * 183) >> (shift < 31 ? shift : 31);
    }
    const int32_t t = x + (x >> 1) - (x >> 4), z = -t >> 10, r = -t & 1023;
    return ((1024 + (-r >> 1)) << 5) >> (z < 31 ? z : 31);
}

template <bool bert>
QVIT_INLINE int64_t exponentials(int32_t* x, int n) {
    int32_t most = x[0];
    int64_t total = 0;
    for (int j = 1; j < n; ++j) most = x[j] > most ? x[j] : most;
    for (int j = 0; j < n; ++j) {
        const int32_t below = x[j] - most;
        x[j] = exponential<bert>(below < -32768 ? -32768 : below);
        total += x[j];
    }
    return total;
}

// `n` up to 2^15, for the sums.
inline void soften(Integer form, int32_t* x, int n) {
    const int64_t total = form == Integer::ivit ? exponentials<false>(x, n) : exponentials<true>(x, n);
    if (form == Integer::fqvit) {
        for (int j = 0; j < n; ++j) {
            const int64_t own = x[j] > 0 ? x[j] : 1, ratio = (total + (own >> 1)) / own;
            const int whole = bits_of(uint64_t(ratio)) - 1;
            const int q = whole + (whole > 0 ? int(ratio >> (whole - 1) & 1) : 0);
            x[j] = x[j] > 0 && q <= 15 ? 1 << (15 - q) : 0;
        }
        return;
    }
    const int length = bits_of(uint64_t(total));
    const uint32_t factor = uint32_t((int64_t(1) << (length + 15)) / total), half = uint32_t(1) << (length - 1);
    for (int j = 0; j < n; ++j) x[j] = int32_t((uint32_t(x[j]) * factor + half) >> length);
}

// ------------------------------------------------------------------------------------------------------------ GELU

class Gates {
  public:
    static const Gates& of(Integer form) {
        static const Gates bert(true), vit(false);
        return form == Integer::ibert ? bert : vit;
    }
    // 14 fraction bits of the product with x, |x| < 2^17.
    QVIT_INLINE int32_t operator()(int32_t x) const {
        const int32_t at = x < -kMostGated ? -kMostGated : x > kMostGated ? kMostGated : x;
        return int32_t((int64_t(x) * gates_[at + kMostGated] + 1024) >> 11);
    }

  private:
    explicit Gates(bool bert) {
        for (int x = -kMostGated; x <= kMostGated; ++x) {
            const int32_t size = x < 0 ? -x : x;
            int64_t gate;
            if (bert) {
                constexpr int64_t kOne = 7261607;
                const int64_t d = std::min(size, 2562) - 2562, apart = kOne - d * d;
                gate = ((kOne + (x > 0 ? apart : x < 0 ? -apart : 0)) << 14) / kOne;
            } else {
                const int32_t a = -size, e = exponential<false>(a + (a >> 1) + (a >> 3) + (a >> 4));
                gate = (int64_t(x >= 0 ? 1 << 15 : e) << 15) / ((1 << 15) + e);
            }
            gates_[x + kMostGated] = uint16_t(gate);
        }
    }
    uint16_t gates_[2 * kMostGated + 1];
};

// The values of a GELU.
QVIT_INLINE void gelu_of(const Gates& gates, float* x, int n) {
    constexpr float kMost = float((1 << 17) - 1), kUnit = 1.0f / 16384.0f;
    int32_t fixed[kLanes];
    fix(x, n, 1024.0f, kMost, fixed);
    for (int j = 0; j < n; ++j) x[j] = float(gates(fixed[j])) * kUnit;
}
QVIT_INLINE float gelu_of(const Gates& gates, float x) {
    gelu_of(gates, &x, 1);
    return x;
}
QVIT_INLINE Lanes gelu_of(const Gates& gates, const Lanes& x) {
    float values[kLanes];
    x.store(values);
    gelu_of(gates, values, kLanes);
    return Lanes(values);
}
