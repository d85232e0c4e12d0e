// One head of one window (or of a whole image): scores, softmax, weighted values, codes. Included behind model.h,
// inside the same namespace.
//
// Queries are taken in blocks of as many rows as a tile has, so that scores and probabilities stay in the first cache.
// Scores are in units of log2(e): exp(s) = 2^x. What a row goes through:
//
//   x       = scale * Σ q k (+ a bias for each pair) (- 100 between regions that do not see one another)
//   uniform   2^(x - most) and their sum; codes of these on the grid of probabilities times the sum; one product
//   log       their sum alone: q = steps * (log2(sum * scale) - (x - most)) is linear in x. Levels 2^(-q / steps), the
//             last of them 0, are two operands of powers of two for every 16 codes: even and odd codes (log-sqrt2), or
//             the eight largest levels and the others (log2); two products, or one where there are no others

class Attention {
  public:
    Attention(const Stage& stage, const Block& block, int prefix, bool shifted, int image, int window, int head,
              const uint8_t* qkv, uint8_t* merged, Scratch& own)
        : stage_(stage),
          block_(block),
          own_(own),
          grids_(block.heads[size_t(head)]),
          prefix_(prefix),
          d_(stage.each),
          area_(stage.area),
          columns_(round_up(area_, kColumns)),
          row_(3 * int64_t(stage.dim)),
          first_token_(size_t(image) * size_t(stage.tokens) + size_t(stage.skip)),
          place_(stage.place[shifted].empty() ? nullptr : stage.place[shifted].data() + size_t(window) * area_),
          bias_(block.position_bias.empty() ? nullptr : block.position_bias.data() + size_t(head) * area_ * columns_),
          region_(shifted && stage.mixed[size_t(window)] ? stage.region.data() + size_t(window) * columns_ : nullptr),
          qkv_(qkv + size_t(head) * d_),
          merged_(merged + size_t(head) * d_) {}

    // For the queries from `first` to `last`.
    void run(int first, int last) {
        pack_keys();
        values_apart_ = block_.splits_values && prefix_ > 0;
        pack_values(own_.values, values_apart_ ? prefix_ : 0, area_);
        if (values_apart_) pack_values(own_.prefix_values, 0, prefix_);
        if (block_.log_steps) tabulate_levels();
        own_.scores.resize(size_t(kRows) * columns_), own_.queries.resize(size_t(kRows) * d_);
        own_.probs.resize(size_t(sixteens_) * kRows * columns_), own_.second.resize(own_.probs.size());
        // Queries of prefix tokens go first where their grid is another one.
        const int border = block_.splits_queries ? std::min(std::max(prefix_, first), last) : first;
        const Grid* query = nullptr;
        for (int begin = first, m; begin < last; begin += m) {
            const bool early = begin < border;
            const int end = early ? border : last;
            m = std::min(even(end - begin, kRows), end - begin);
            const Grid* next = early ? &grids_.prefix_query : &grids_.query;
            if (next != query) begin_scores(*(query = next));
            score(begin, m);
            if (block_.softmax != Integer::none)
                whole_probabilities(m);
            else if (block_.log_steps)
                log_probabilities(m);
            else
                probabilities(m);
            block_.log_steps ? weigh_by_levels(begin, m) : weigh(begin, m);
        }
    }

  private:
    size_t token(int t) const { return first_token_ + size_t(place_ ? place_[t] : t); }
    const int8_t* key(int t) const { return (const int8_t*)(qkv_ + token(t) * row_ + stage_.dim); }
    const int8_t* value(int t) const { return (const int8_t*)(qkv_ + token(t) * row_ + 2 * stage_.dim); }

    // The largest of some integers of both signs, as far as the form of the products asks for it.
    template <class Of>
    int largest(Of&& of) const {
        int least = 0, most = 0;
#if defined(QVIT_AVX2)
        for (int i = 0; i < area_; ++i) {
            const int8_t* x = of(i);
            for (int t = 0; t < d_; ++t) least = x[t] < least ? x[t] : least, most = x[t] > most ? x[t] : most;
        }
#else
        (void)of;
#endif
        return std::max(most, -least);
    }

    // Keys as the right operand of the scores, (d, area).
    void pack_keys() {
        Panels& to = own_.keys;
        to.n = area_, to.k = d_, to.groups = d_ / 4;
        to.bytes.resize(size_t(columns_) * d_);
        to.lowest.clear();
        for (int j = 0; j < columns_; ++j) {
            int8_t* panel = to.bytes.data() + size_t(j / kColumns) * d_ * kColumns + (j % kColumns) * 4;
            if (j < area_) {
                const int8_t* from = key(j);
                for (int g = 0; g < to.groups; ++g) std::memcpy(panel + size_t(g) * kColumns * 4, from + 4 * g, 4);
            } else {
                for (int g = 0; g < to.groups; ++g) std::memset(panel + size_t(g) * kColumns * 4, 0, 4);
            }
        }
        sum_columns(to);
        largest_key_ = largest([&](int t) { return key(t); });
    }

    // Values as the right operand of the weighted sums, (area, d): those of the tokens from `first` to `last`; 0 for
    // all others.
    void pack_values(Panels& to, int first, int last) {
        static const int8_t nothing[256 + kColumns] = {};
        to.n = d_, to.k = last, to.groups = round_up(last, 4) / 4;
        to.bytes.resize(size_t(round_up(d_, kColumns)) * to.groups * 4);
        to.lowest.clear();
        for (int g = 0; g < to.groups; ++g) {
            const int8_t* from[4];
            for (int r = 0; r < 4; ++r) from[r] = 4 * g + r >= first && 4 * g + r < last ? value(4 * g + r) : nothing;
            for (int begin = 0; begin < d_; begin += kColumns)
                interleave(from[0] + begin, from[1] + begin, from[2] + begin, from[3] + begin,
                           std::min(kColumns, d_ - begin),
                           to.bytes.data() + (size_t(begin / kColumns) * to.groups + g) * kColumns * 4);
        }
        sum_columns(to);
        to.begin(to.left, block_.log_steps ? 0 : grids_.probs.low,
                 block_.log_steps ? 128 : grids_.probs.high - grids_.probs.low,
                 largest([&](int t) { return value(t); }));
    }

    // For queries on a grid: how their products with keys become scores. A query's offset adds to each key's column.
    void begin_scores(const Grid& query) {
        Panels& keys = own_.keys;
        keys.begin(keys.left, query.low, query.high - query.low, largest_key_);
        own_.key_scale.resize(size_t(columns_)), own_.key_add.resize(size_t(columns_));
        const double unit = block_.softmax == Integer::none ? 1.4426950408889634 : double(kScoreUnit);
        for (int j = 0; j < columns_; ++j) {
            const double scale = double((j < prefix_ ? grids_.prefix_key : grids_.key).scale) * stage_.factor * unit;
            own_.key_scale[size_t(j)] = float(query.scale * scale);
            // Columns behind the last token have probability 0, so that what follows runs over whole vectors.
            own_.key_add[size_t(j)] = j < area_ ? float(query.offset * scale * keys.sums[size_t(j)]) : -1e30f;
        }
    }

    void score(int begin, int m) {
        const uint8_t* queries = qkv_ + token(begin) * row_;
        if (place_) {
            for (int i = 0; i < m; ++i)
                std::copy_n(qkv_ + token(begin + i) * row_, d_, own_.queries.data() + size_t(i) * d_);
            queries = own_.queries.data();
        }
        std::fill_n(most_, m, Lanes(-1e30f));
        const float unit = block_.score_unit();
        multiply(m, queries, place_ ? d_ : row_, own_.keys, own_.keys.left,
                 [&](int, int rows, int column, int, const int32_t* sums) {
                     for (int j = 0; j < kColumns; j += kLanes) {
                         const int at = column + j;
                         const Lanes by(own_.key_scale.data() + at), add(own_.key_add.data() + at);
                         for (int i = 0; i < rows; ++i) {
                             Lanes x = mad(of_integers(sums + i * kColumns + j), by, add);
                             if (bias_) x = x + Lanes(bias_ + size_t(begin + i) * columns_ + at);
                             if (region_) {
                                 const Lanes apart = Lanes(region_ + at) - Lanes(region_[begin + i]);
                                 x = x - where_positive(apart * apart, Lanes(100.0f * unit), Lanes(0.0f));
                             }
                             x.store(own_.scores.data() + size_t(i) * columns_ + at);
                             most_[i] = greater_of(x, most_[i]);
                         }
                     }
                 });
    }

    // 2^(x - most) of a row, and their sum.
    template <class Use>
    QVIT_INLINE float exponentials(int i, Use&& use) {
        const Lanes most(greatest(most_[i]));
        most_[i] = most;
        const float* x = own_.scores.data() + size_t(i) * columns_;
        return total_of(area_, [&](int j) {
            const Lanes e = power_of_two(Lanes(x + j) - most);
            use(j, e);
            return e;
        });
    }

    void probabilities(int m) {
        float totals[kRows];
        for (int i = 0; i < m; ++i) {
            float* x = own_.scores.data() + size_t(i) * columns_;
            totals[i] = exponentials(i, [&](int j, const Lanes& e) { e.store(x + j); });
        }
        for (int i = 0; i < m; ++i) {
            Grid grid = grids_.probs;
            grid.offset *= totals[i], grid.inverse /= totals[i];
            encode_probabilities(i, grid);
        }
    }

    void encode_probabilities(int i, const Grid& grid) {
        const float* x = own_.scores.data() + size_t(i) * columns_;
        uint8_t* to = own_.probs.data() + size_t(i) * columns_;
        const Coder<Lanes> coder(grid);
        for (int j = 0; j < area_; j += kLanes) store(to + j, coder.bytes(Lanes(x + j)));
        int32_t codes = 0;
        for (int j = 0; grids_.value.offset != 0 && j < area_; ++j) codes += to[j];
        prob_sums_[i] = float(codes + area_ * grids_.probs.low);
    }

    // By an integer form of softmax, whose probabilities are rounded to their grid like any other. On a logarithmic
    // one: as many levels down as there are bounds above.
    void whole_probabilities(int m) {
        own_.whole.resize(size_t(columns_));
        float bounds[256];
        for (int q = 0; q < grids_.probs.high && block_.log_steps; ++q)
            bounds[q] = float(grids_.probs.scale * std::exp2(-(q + 0.5) / block_.log_steps));
        for (int i = 0; i < m; ++i) {
            float* x = own_.scores.data() + size_t(i) * columns_;
            fix(x, area_, 1.0f, float(1 << 20), own_.whole.data());
            soften(block_.softmax, own_.whole.data(), area_);
            for (int j = 0; j < area_; ++j) x[j] = float(own_.whole[size_t(j)]) * kProbability;
            for (int j = area_; j < columns_; ++j) x[j] = 0;
            if (!block_.log_steps) {
                encode_probabilities(i, grids_.probs);
                continue;
            }
            for (int j = 0; j < area_; j += kLanes) {
                const Lanes p(x + j);
                Lanes q;
                for (int level = 0; level < grids_.probs.high; ++level)
                    q = q + where_positive(Lanes(bounds[level]) - p, Lanes(1.0f), Lanes(0.0f));
                store_levels(i, j, bytes_of(q, 0));
            }
        }
    }

    template <class Codes>
    void store_levels(int i, int j, const Codes& codes) {
        for (int part = 0; part < sixteens_; ++part) {
            const auto places = sixteens_ > 1 ? within(codes, 16 * part) : codes;
            const size_t at = (size_t(part) * kRows + i) * columns_ + j;
            store(own_.probs.data() + at, looked_up(levels_[part], places));
            if (two_operands_) store(own_.second.data() + at, looked_up(levels_[part] + 16, places));
        }
    }

    void tabulate_levels() {
        const int high = grids_.probs.high, steps = block_.log_steps;
        two_operands_ = steps == 2 || high > 8;
        sixteens_ = std::min((high + 15) / 16, kMostOctaves * steps / 16);
        for (int q = 0; q < 16 * sixteens_; ++q) {
            const bool other = steps == 2 ? q & 1 : q & 8;
            const int level = q < high ? 128 >> ((q >> (steps - 1)) & 7) : 0;
            levels_[q / 16][q % 16] = uint8_t(other ? 0 : level);
            levels_[q / 16][16 + q % 16] = uint8_t(other ? level : 0);
        }
    }

    void log_probabilities(int m) {
        float of_one[kRows];
        for (int i = 0; i < kRows; ++i) of_one[i] = 1.0f;
        for (int i = 0; i < m; ++i) of_one[i] = exponentials(i, [](int, const Lanes&) {}) * grids_.probs.scale;
        for (int i = 0; i < kRows; ++i) of_one[i] = logarithm(of_one[i]);
        const float steps = float(block_.log_steps);
        const Lanes by(-steps), highest(float(grids_.probs.high));
        for (int i = 0; i < m; ++i) {
            const float* x = own_.scores.data() + size_t(i) * columns_;
            const Lanes most = most_[i], from(steps * of_one[i]);
            auto code = [&](int j) { return lesser_of(mad(Lanes(x + j) - most, by, from), highest); };
            int j = 0;
#if defined(QVIT_AVX512_VNNI)
            for (; j + 4 * kLanes <= columns_; j += 4 * kLanes)
                store_levels(i, j, bytes_of(code(j), code(j + kLanes), code(j + 2 * kLanes), code(j + 3 * kLanes)));
#endif
            for (; j < area_; j += kLanes) store_levels(i, j, bytes_of(greater_of(code(j), Lanes()), 0));
        }
    }

    // Adds the part of prefix tokens, whose values have another scale, to weighted values.
    void add_prefix_values(int m, const uint8_t* weights, float scale, int column, float* y) {
        if (!values_apart_) return;
        alignas(64) int32_t sums[kRows * kColumns];
        multiply_tile(m, weights, columns_, own_.prefix_values, own_.prefix_values.left, column, sums);
        const Lanes by(scale * grids_.prefix_value.scale);
        for (int t = 0; t < m * kColumns; t += kLanes) (Lanes(y + t) + of_integers(sums + t) * by).store(y + t);
    }

    // Codes of the head's outputs for the queries from `begin`, of a tile that begins at `column`.
    void encode_outputs(int begin, int m, int column, const float* y) {
        const Coder<Lanes> coder(grids_.output);
        for (int i = 0; i < m; ++i) {
            uint8_t* to = merged_ + token(begin + i) * size_t(stage_.dim);
            for (int j = column; j < std::min(column + kColumns, d_); j += kLanes)
                store(to + j, coder.bytes(Lanes(y + i * kColumns + j - column)), d_ - j);
        }
    }

    void weigh(int begin, int m) {
        alignas(64) float y[kRows * kColumns], by_column[256 + kColumns];
        const Panels& values = own_.values;
        const float scale = grids_.probs.scale * grids_.value.scale;
        const float by_probs = grids_.probs.scale * grids_.value.offset,
                    by_value = grids_.probs.offset * grids_.value.scale;
        const float constant = float(area_) * grids_.probs.offset * grids_.value.offset;
        for (int t = 0; t < values.n; ++t) by_column[t] = by_value * float(values.sums[size_t(t)]) + constant;
        for (int t = 0; values_apart_ && t < d_; ++t)
            by_column[t] += grids_.probs.offset * grids_.prefix_value.scale * float(own_.prefix_values.sums[size_t(t)]);
        multiply(m, own_.probs.data(), columns_, values, values.left,
                 [&](int, int rows, int column, int, const int32_t* sums) {
                     for (int j = 0; j < kColumns; j += kLanes) {
                         const Lanes by(scale), add(by_column + column + j);
                         for (int i = 0; i < rows; ++i)
                             (of_integers(sums + i * kColumns + j) * by + add + Lanes(prob_sums_[i] * by_probs))
                                 .store(y + i * kColumns + j);
                     }
                     add_prefix_values(rows, own_.probs.data(), grids_.probs.scale, column, y);
                     encode_outputs(begin, rows, column, y);
                 });
    }

    void weigh_by_levels(int begin, int m) {
        const float other = block_.log_steps == 2 ? 0.70710678f : 1 / 256.0f;
        const Panels& values = own_.values;
        alignas(64) int32_t sums[kRows * kColumns];
        alignas(64) float y[kRows * kColumns];
        for (int column = 0; column < d_; column += kColumns) {
            float one = grids_.probs.scale / 128.0f;
            std::fill_n(y, m * kColumns, 0.0f);
            auto add = [&](const uint8_t* levels, float scale) {
                multiply_tile(m, levels, columns_, values, values.left, column, sums);
                const Lanes by(scale * grids_.value.scale);
                for (int t = 0; t < m * kColumns; t += kLanes)
                    (Lanes(y + t) + of_integers(sums + t) * by).store(y + t);
                add_prefix_values(m, levels, scale, column, y);
            };
            for (int part = 0; part < sixteens_; ++part, one *= block_.log_steps == 2 ? 1 / 256.0f : 1 / 65536.0f) {
                const size_t from = size_t(part) * kRows * columns_;
                add(own_.probs.data() + from, one);
                if (two_operands_) add(own_.second.data() + from, one * other);
            }
            encode_outputs(begin, m, column, y);
        }
    }

    const Stage& stage_;
    const Block& block_;
    Scratch& own_;
    const HeadNumbers& grids_;
    const int prefix_, d_, area_, columns_;
    const int64_t row_;
    const size_t first_token_;
    const int* const place_;
    const float *const bias_, *const region_;
    const uint8_t* const qkv_;
    uint8_t* const merged_;
    bool values_apart_ = false, two_operands_ = false;
    int largest_key_ = 0, sixteens_ = 1;
    Lanes most_[kRows];  // of each row of scores: lane by lane, then in all lanes
    float prob_sums_[kRows];
    // Levels of 16 codes each: first operand, second operand. So many octaves below the largest one, a level is nothing
    // beside the rounding of a float, and taken for 0.
    static constexpr int kMostOctaves = 48;
    uint8_t levels_[kMostOctaves / 8][32];
};

inline void Model::attend(const Stage& stage, const Block& block, bool shifted, int image, int window, int head,
                          int first, int last, Scratch& own) {
    Watch watch(watching, own.seconds[kAttention]);
    Attention(stage, block, prefix, shifted, image, window, head, qkv.data(), merged.data(), own).run(first, last);
}
