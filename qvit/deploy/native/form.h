// What an instruction set offers (`Form`). Included after model.h, inside the same namespace.

inline std::unique_ptr<Runner> make(const Network& network, int threads) {
    return std::make_unique<Model>(network, threads);
}

inline void product(int m, int n, int k, const uint8_t* a, int low, int most_left, const int8_t* w, int32_t* out) {
    const int lda = round_up(k, 4);
    Buffer<uint8_t> rows(size_t(m) * lda);
    for (int i = 0; i < m; ++i) std::copy_n(a + size_t(i) * k, k, rows.data() + size_t(i) * lda);
    Panels panels;
    panels.begin(panels.left, low, most_left, fill_panels(panels, n, k, w, k));
    multiply(m, rows.data(), lda, panels, panels.left,
             [&](int row, int tile, int column, int columns, const int32_t* sums) {
                 for (int i = 0; i < tile; ++i)
                     std::copy_n(sums + i * kColumns, columns, out + size_t(row + i) * n + column);
             });
}

// LayerNorm without weight and bias, softmax or GELU of rows in fixed point (integers.h).
inline void function(Function which, Integer form, int rows, int n, const int32_t* x, int32_t* out) {
    std::copy_n(x, size_t(rows) * n, out);
    for (int i = 0; i < rows; ++i, out += n) {
        if (which == Function::norm) normalize(form, out, n);
        if (which == Function::softmax) soften(form, out, n);
        for (int j = 0; which == Function::gelu && j < n; ++j) out[j] = Gates::of(form)(out[j]);
    }
}
