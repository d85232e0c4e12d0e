// From a packed file to the numbers of a network: layers, norms, heads, stages. No processor is thought of here.
//
// The file's document `network` (docs/packed-files.md) says how the model is built; names of tensors are timm's. Folded
// on the way: a LayerScale into the layer before it, offsets of activations into biases (x̂ = s·q + β, so Σ β·ŵ per
// row), prefix tokens and positions into one array.
#pragma once
#include <set>

#include "file.h"

namespace qvit {

enum class Activation { gelu, gelu_tanh, quick_gelu, silu, relu, gelu_ibert, gelu_ivit };
// Forms of LayerNorm, softmax and GELU on integers (integers.h); none: in float.
enum class Integer { none, ibert, ivit, fqvit };
enum class Mlp { plain, glu, glu_last, swiglu };
// Of tokens: the first, the mean of those behind the prefix, that of all, two others of those behind the prefix; none
// are pooled, so that each has an answer; a learned query attends to them.
enum class Pool { token, avg, all, max, avgmax, none, map };

// A uniform grid: x = scale * q + offset, q from low to high.
struct Grid {
    float scale = 1, inverse = 1, offset = 0;
    int low = 0, high = 0;
};

// y = scale * Σ q_x q_w + bias, per segment of the inputs.
struct LayerNumbers {
    int n = 0, k = 0, segments = 0;  // 0: no layer
    std::vector<int8_t> codes;       // (n, k)
    std::vector<float> scale;        // (segments, n)
    std::vector<float> bias;         // (n)
    std::vector<Grid> grid;          // of the input: one per segment
    // Where inputs of prefix tokens are on a grid of their own: it, and what their outputs are scaled by and begin at.
    bool splits = false;
    Grid prefix_grid;
    std::vector<float> prefix_scale, prefix_bias;  // (n)
};

struct NormNumbers {
    bool there = false, centred = true;  // centred: LayerNorm; else RMSNorm, which takes no mean off
    float epsilon = 0;
    Integer form = Integer::none;
    std::vector<float> weight, bias;
};

struct HeadNumbers {
    Grid query, key, value, probs, output;
    Grid prefix_query, prefix_key, prefix_value;  // of prefix tokens; like the others' where nothing else is said
};

struct BlockNumbers {
    NormNumbers norm1, norm2, mlp_norm;
    NormNumbers query_norm, key_norm;  // weight and bias for all heads
    LayerNumbers qkv, proj, fc1, gate, fc2;
    std::vector<HeadNumbers> heads;
    bool splits_queries = false, splits_keys = false, splits_values = false;  // prefix tokens have grids of their own
    int log_steps = 0;                 // of the probabilities: 0 for a uniform grid, else levels per octave
    Activation activation = Activation::gelu;
    Integer softmax = Integer::none;
    std::vector<float> position_bias;  // (heads, area, area), added to the scores; or none
};

struct StageNumbers {
    int dim = 0, heads = 0, hidden = 0, rows = 0, columns = 0;  // rows and columns of tokens behind the prefix
    int window_y = 0, window_x = 0, shift_y = 0, shift_x = 0;   // 0: attention among all tokens
    int skip = 0;                                               // but for so many at the beginning
    NormNumbers merge_norm;                                     // of four tokens of the stage before
    LayerNumbers merge;
    std::vector<BlockNumbers> blocks;
};

struct Network {
    int channels = 0, side_y = 0, side_x = 0, patch_y = 0, patch_x = 0, prefix = 0;
    int width = 0;  // of an answer: classes, or channels of features, which have no head
    Pool pool = Pool::token;
    Activation activation = Activation::gelu;
    Mlp mlp = Mlp::plain;
    LayerNumbers embed, head;
    NormNumbers patch_norm, first_norm, norm, head_norm;
    std::vector<float> added;  // (tokens, dim): what every image's tokens start from
    std::vector<StageNumbers> stages;
    std::vector<StageNumbers> map;  // attention pooling: a block whose query is the same for all tokens; or none

    // Of an image's answer: (width), (tokens, width) or, of windows, (rows, columns, width).
    std::vector<int> answer() const {
        const StageNumbers& last = stages.back();
        if (pool != Pool::none) return {width};
        if (last.window_y) return {last.rows, last.columns, width};
        return {last.rows * last.columns + prefix, width};
    }
};

class NetworkReader {
  public:
    static Network read(File& file) {
        NetworkReader reader(file);
        Network network = reader.all();
        file.require_all_used();
        return network;
    }

  private:
    explicit NetworkReader(File& file) : file_(file), document_(file.network()) {}

    static constexpr int kMostBlocks = 256, kLargestSide = 1 << 13, kWidest = 1 << 16, kLongestSum = 1 << 15,
                         kMostTokens = 1 << 15;
    static constexpr int kLargestHead = 256;
    static constexpr int kMostNormed = 4096;  // more channels could overflow sums of squares

    Network all() {
        if (!document_.is(Json::Kind::object)) throw Problem("its network is no object");
        static const char* const keys[] = {"kind",       "image", "patch",   "prefix", "pool",   "classes",
                                           "activation", "norm",  "epsilon", "mlp",    "stages", "map",
                                          "nonlinear"};
        for (const auto& member : document_.members)
            if (std::find(std::begin(keys), std::end(keys), member.first) == std::end(keys))
                throw Problem("its network has the unknown key '" + member.first + "'");
        swin_ = choice("kind", {"vit", "swin"}) == 1;
        rms_ = choice("norm", {"layer", "rms"}) == 1;
        const Json& epsilon = document_.at("epsilon");
        if (!epsilon.is(Json::Kind::number) || !(epsilon.number >= 0 && epsilon.number < 1))
            throw Problem("its network has an impossible epsilon");
        epsilon_ = float(epsilon.number);
        const auto image = numbers(document_, "image", 3, kLargestSide),
                   patch = numbers(document_, "patch", 2, kLargestSide);
        net_.channels = image[0], net_.side_y = image[1], net_.side_x = image[2];
        net_.patch_y = patch[0], net_.patch_x = patch[1];
        if (net_.channels > 64 || image[1] < patch[0] || image[2] < patch[1])
            throw Problem("its network has impossible images");
        net_.prefix = int(document_.at("prefix").whole(0, 1024, "the number of prefix tokens"));
        const int classes = int(document_.at("classes").whole(0, 1 << 20, "the number of classes"));
        net_.pool = Pool(choice("pool", {"token", "avg", "all", "max", "avgmax", "none", "map"}));
        net_.activation = Activation(choice("activation", {"gelu", "gelu-tanh", "quick-gelu", "silu", "relu"}));
        net_.mlp = Mlp(choice("mlp", {"plain", "glu", "glu-last", "swiglu"}));
        if (net_.pool == Pool::token && net_.prefix == 0) throw Problem("its network pools by a token that it lacks");
        if (const Json* forms = document_.find("nonlinear")) read_forms(*forms);
        const Json& stages = document_.at("stages");
        if (!stages.is(Json::Kind::list) || stages.items.empty() || stages.items.size() > 8 ||
            (!swin_ && stages.items.size() > 1) || (swin_ && net_.prefix))
            throw Problem("its network has impossible stages");
        if ((net_.pool == Pool::map) != (document_.find("map") != nullptr) || (swin_ && net_.pool == Pool::map))
            throw Problem("its network has an impossible pooling");
        int rows = net_.side_y / net_.patch_y, columns = net_.side_x / net_.patch_x;
        for (const Json& stage : stages.items) {
            read_stage(stage, rows, columns);
            rows /= 2, columns /= 2;
        }
        const StageNumbers &first = net_.stages.front(), &last = net_.stages.back();
        net_.embed = layer("patch_embed.proj", {"patch_embed.proj.weight"}, "patch_embed.proj.input", first.dim,
                           net_.channels * net_.patch_y * net_.patch_x);
        net_.patch_norm = norm("patch_embed.norm", first.dim), net_.first_norm = norm("norm_pre", first.dim);
        net_.norm = norm("norm", last.dim), net_.head_norm = norm("fc_norm", last.dim);
        const std::string head = swin_ ? "head.fc" : "head";
        if (classes) net_.head = layer(head, {head + ".weight"}, head + ".input", classes, last.dim);
        net_.width = classes ? classes : last.dim;
        if (net_.pool == Pool::none && (int64_t(last.rows) * last.columns + net_.prefix) * net_.width > 1 << 28)
            throw Problem("its network has impossibly many answers");
        if (!swin_) read_positions(first);
        if (net_.pool == Pool::map) read_map(last);
        for (const auto& [place, name] : forms_)
            if (!used_.count(place)) throw Problem("its network has no '" + place + "' to compute on integers");
        return std::move(net_);
    }

    // Which forms LayerNorm, softmax and GELU have, by kind or by path.
    void read_forms(const Json& forms) {
        if (!forms.is(Json::Kind::object)) throw Problem("its network has impossible forms on integers");
        for (const auto& [place, name] : forms.members) {
            if (!name.is(Json::Kind::text)) throw Problem("its network has impossible forms on integers");
            forms_[place] = name.text;
        }
    }

    Integer form_of(const std::string& path, const std::string& operation) {
        std::string name = "float";
        for (const std::string& place : {operation, path}) {
            const auto found = forms_.find(place);
            if (found != forms_.end()) name = found->second, used_.insert(place);
        }
        if (name == "float") return Integer::none;
        if (name == "i-bert") return Integer::ibert;
        if (name == "i-vit") return Integer::ivit;
        if (name == "fq-vit" && operation == "softmax") return Integer::fqvit;
        throw Problem("'" + path + "' computes by the form '" + name + "', which the native engine does not know");
    }

    void read_functions(BlockNumbers& block, const std::string& softmax, const std::string& gelu) {
        block.softmax = form_of(softmax, "softmax");
        block.activation = net_.activation;
        if (net_.activation != Activation::gelu && net_.activation != Activation::gelu_tanh) return;
        const Integer form = form_of(gelu, "gelu");
        if (form != Integer::none)
            block.activation = form == Integer::ibert ? Activation::gelu_ibert : Activation::gelu_ivit;
    }

    // Attention pooling of a ViT. Its query sees no image: it is computed here, and becomes the bias of a q|k|v
    // projection whose weights for q are 0.
    void read_map(const StageNumbers& last) {
        const Json& document = document_.at("map");
        StageNumbers map;
        map.dim = last.dim, map.rows = last.rows, map.columns = last.columns;
        map.heads = int(document.at("heads").whole(1, 1024, "a number of heads"));
        map.hidden = int(document.at("hidden").whole(1, kWidest, "a number of channels"));
        map.skip = int(document.at("skip").whole(0, net_.prefix, "a number of tokens"));
        if (document.members.size() != 3) throw Problem("the pooling of its network has an unknown key");
        require_heads(map);
        const int dim = map.dim;
        const std::string path = "attn_pool", mlp = path + ".mlp";
        BlockNumbers block;
        block.norm1 = std::move(net_.norm), net_.norm = {};
        block.norm2 = norm(path + ".norm", dim);
        block.qkv = layer(path + ".kv", {path + ".kv.weight"}, path + ".kv.input", 2 * dim, dim);
        std::vector<float> query = file_.floats(path + ".latent", dim);
        if (file_.has(path + ".q.weight")) {
            const auto weight = file_.floats(path + ".q.weight", int64_t(dim) * dim), latent = std::move(query);
            query = file_.has(path + ".q.bias") ? file_.floats(path + ".q.bias", dim) : std::vector<float>(size_t(dim));
            for (int i = 0; i < dim; ++i) {
                double sum = query[size_t(i)];
                for (int j = 0; j < dim; ++j) sum += double(weight[size_t(i) * dim + j]) * double(latent[size_t(j)]);
                query[size_t(i)] = float(sum);
            }
        }
        block.qkv.n = 3 * dim;
        block.qkv.codes.insert(block.qkv.codes.begin(), size_t(dim) * dim, 0);
        block.qkv.scale.insert(block.qkv.scale.begin(), size_t(dim), 0.0f);
        block.qkv.bias.insert(block.qkv.bias.begin(), query.begin(), query.end());
        block.proj = layer(path + ".proj", {path + ".proj.weight"}, path + ".output", dim, dim, map.heads);
        block.fc1 = layer(mlp + ".fc1", {mlp + ".fc1.weight"}, mlp + ".fc1.input", map.hidden, dim);
        block.fc2 = layer(mlp + ".fc2", {mlp + ".fc2.weight"}, mlp + ".fc2.input", dim, map.hidden);
        read_heads(block, path, map), read_functions(block, path + ".softmax", mlp + ".act");
        if (net_.mlp != Mlp::plain) throw Problem("its network pools by an MLP of another kind than its blocks have");
        if (block.qkv.splits || block.fc1.splits || block.fc2.splits || block.splits_queries || block.splits_keys ||
            block.splits_values)
            throw Problem("its network pools tokens of two groups");
        map.blocks.push_back(std::move(block));
        net_.map.push_back(std::move(map));
    }

    static void require_heads(const StageNumbers& stage) {
        const int each = stage.dim / stage.heads;
        if (stage.dim % stage.heads || each % 4 || each > kLargestHead)
            throw Problem("heads must have a multiple of 4 channels, up to 256");
    }

    // What every image's tokens start from: prefix tokens, then zeros for the patches; positions for all, or for
    // patches.
    void read_positions(const StageNumbers& stage) {
        const int patches = stage.rows * stage.columns, tokens = patches + net_.prefix, dim = stage.dim;
        std::vector<float> added(size_t(tokens) * dim, 0.0f);
        int at = 0;
        for (const char* name : {"cls_token", "reg_token"}) {
            if (!file_.has(name)) continue;
            const int count = int(file_.count(name) / dim);
            if (at + count > net_.prefix) throw Problem("its network has more prefix tokens than it says");
            const auto values = file_.floats(name, int64_t(count) * dim);
            std::copy(values.begin(), values.end(), added.begin() + size_t(at) * dim);
            at += count;
        }
        if (at != net_.prefix) throw Problem("its network has fewer prefix tokens than it says");
        if (file_.has("pos_embed")) {
            const bool every = file_.count("pos_embed") == int64_t(tokens) * dim;
            const int first = every ? 0 : net_.prefix;
            const auto values = file_.floats("pos_embed", int64_t(tokens - first) * dim);
            for (size_t i = 0; i < values.size(); ++i) added[size_t(first) * dim + i] += values[i];
        }
        net_.added = std::move(added);
    }

    void read_stage(const Json& document, int rows, int columns) {
        static const char* const keys[] = {"depth", "dim", "heads", "hidden", "window", "shift"};
        for (const auto& member : document.members)
            if (std::find(std::begin(keys), std::end(keys), member.first) == std::end(keys))
                throw Problem("a stage of its network has the unknown key '" + member.first + "'");
        const int index = int(net_.stages.size());
        StageNumbers stage;
        stage.rows = rows, stage.columns = columns;
        const int depth = int(document.at("depth").whole(1, kMostBlocks, "a depth"));
        stage.dim = int(document.at("dim").whole(4, kWidest, "a number of channels"));
        stage.heads = int(document.at("heads").whole(1, 1024, "a number of heads"));
        stage.hidden = int(document.at("hidden").whole(1, kWidest, "a number of channels"));
        require_heads(stage);
        if (rows < 1 || columns < 1 || int64_t(rows) * columns + net_.prefix > kMostTokens ||
            int64_t(rows) * columns * stage.dim > 1 << 28)
            throw Problem("its network has an impossible number of tokens");
        if (swin_) {
            const auto window = numbers(document, "window", 2, kLargestSide),
                       shift = numbers(document, "shift", 2, kLargestSide, 0);
            stage.window_y = window[0], stage.window_x = window[1], stage.shift_y = shift[0], stage.shift_x = shift[1];
            if (rows % window[0] || columns % window[1] || shift[0] >= window[0] || shift[1] >= window[1] ||
                window[0] * window[1] > 4096)
                throw Problem("its network has windows that do not fit its images");
        }
        if (index) {
            const StageNumbers& before = net_.stages.back();
            if (before.rows % 2 || before.columns % 2) throw Problem("its network merges an odd number of tokens");
            const std::string path = "layers." + std::to_string(index) + ".downsample";
            stage.merge_norm = norm(path + ".norm", 4 * before.dim);
            stage.merge = layer(path + ".reduction", {path + ".reduction.weight"}, path + ".reduction.input", stage.dim,
                                4 * before.dim);
        }
        for (int b = 0; b < depth; ++b) {
            const std::string path = swin_ ? "layers." + std::to_string(index) + ".blocks." + std::to_string(b)
                                           : "blocks." + std::to_string(b);
            stage.blocks.push_back(read_block(path, stage));
        }
        net_.stages.push_back(std::move(stage));
    }

    BlockNumbers read_block(const std::string& path, const StageNumbers& stage) {
        BlockNumbers block;
        const int dim = stage.dim, hidden = stage.hidden;
        const std::string attention = path + ".attn", mlp = path + ".mlp";
        block.norm1 = norm(path + ".norm1", dim), block.norm2 = norm(path + ".norm2", dim);
        const std::string qkv = attention + ".qkv";
        block.qkv = layer(qkv, {qkv + ".query_weight", qkv + ".key_weight", qkv + ".value_weight"}, qkv + ".input",
                          3 * dim, dim);
        block.proj = layer(attention + ".proj", {attention + ".proj.weight"}, attention + ".output", dim, dim,
                           stage.heads, path + ".ls1.gamma");
        const bool packed = net_.mlp == Mlp::glu || net_.mlp == Mlp::glu_last;
        if (net_.mlp == Mlp::swiglu) {
            block.gate = layer(mlp + ".fc1_g", {mlp + ".fc1_g.weight"}, mlp + ".fc1_g.input", hidden, dim);
            block.fc1 = layer(mlp + ".fc1_x", {mlp + ".fc1_x.weight"}, mlp + ".fc1_x.input", hidden, dim);
        } else {
            block.fc1 =
                layer(mlp + ".fc1", {mlp + ".fc1.weight"}, mlp + ".fc1.input", packed ? 2 * hidden : hidden, dim);
        }
        block.mlp_norm = norm(mlp + ".norm", hidden);
        block.fc2 = layer(mlp + ".fc2", {mlp + ".fc2.weight"}, mlp + ".fc2.input", dim, hidden, 1, path + ".ls2.gamma");
        read_heads(block, attention, stage), read_functions(block, attention + ".softmax", mlp + ".act");
        if (swin_) read_position_bias(block, attention, stage);
        return block;
    }

    void read_heads(BlockNumbers& block, const std::string& path, const StageNumbers& stage) {
        const int heads = stage.heads, each = stage.dim / heads;
        block.heads.resize(size_t(heads));
        Grid HeadNumbers::*const parts[] = {&HeadNumbers::query, &HeadNumbers::key, &HeadNumbers::value,
                                            &HeadNumbers::probs, &HeadNumbers::output};
        const char* const names[] = {"query", "key", "value", "probs", "output"};
        Grid HeadNumbers::*const of_prefixes[] = {&HeadNumbers::prefix_query, &HeadNumbers::prefix_key,
                                                  &HeadNumbers::prefix_value};
        bool BlockNumbers::*const splits[] = {&BlockNumbers::splits_queries, &BlockNumbers::splits_keys,
                                              &BlockNumbers::splits_values};
        for (int part = 0; part < 5; ++part) {
            const std::string name = path + "." + names[part];
            const Site& site = file_.site(name);
            const bool logarithmic = site.quantizer == "log2" || site.quantizer == "log-sqrt2";
            if (part == 3 && logarithmic) block.log_steps = site.quantizer == "log2" ? 1 : 2;
            const auto grids = grids_of(site, name, heads, part == 3);
            for (int h = 0; h < heads; ++h) block.heads[h].*parts[part] = grids[h];
            if (part < 3) {
                if (site.low_width && site.numbers.count("offset"))
                    throw Problem("'" + name + "' has two groups of tokens with an offset");
                const auto of_prefix = site.low_width ? prefix_grids_of(site, name, heads) : grids;
                for (int h = 0; h < heads; ++h) block.heads[h].*of_prefixes[part] = of_prefix[h];
                block.*splits[part] = site.low_width > 0;
            } else if (site.low_width) {
                throw Problem("'" + name + "' has two groups of tokens");
            }
            if (part < 3 && !site.is_signed) throw Problem("'" + name + "' has an unsigned grid");
            if (part == 3 && site.is_signed) throw Problem("'" + name + "' has a signed grid");
            if (site.quantizer != "irm") continue;
            NormNumbers& norm = part == 0 ? block.query_norm : block.key_norm;
            if (part > 1) throw Problem("'" + name + "' is rectified, which only queries and keys are");
            const auto gain = spread(site, name, "gain", heads), shift = spread(site, name, "shift", heads);
            norm.there = true, norm.epsilon = 1e-5f;
            for (int h = 0; h < heads; ++h)
                norm.weight.insert(norm.weight.end(), each, gain[h]), norm.bias.insert(norm.bias.end(), each, shift[h]);
        }
        NormNumbers* const norms[] = {&block.query_norm, &block.key_norm};
        for (int part = 0; part < 2; ++part) {
            const NormNumbers one = norm(path + (part ? ".k_norm" : ".q_norm"), each);
            if (!one.there) continue;
            if (norms[part]->there) throw Problem("'" + path + "' normalises twice");
            *norms[part] = one;
            for (int h = 1; h < heads; ++h) {
                norms[part]->weight.insert(norms[part]->weight.end(), one.weight.begin(), one.weight.end());
                norms[part]->bias.insert(norms[part]->bias.end(), one.bias.begin(), one.bias.end());
            }
        }
    }

    void read_position_bias(BlockNumbers& block, const std::string& path, const StageNumbers& stage) {
        const int wy = stage.window_y, wx = stage.window_x, area = wy * wx, heads = stage.heads;
        const auto table =
            file_.floats(path + ".relative_position_bias_table", int64_t(2 * wy - 1) * (2 * wx - 1) * heads);
        block.position_bias.resize(size_t(heads) * area * area);
        for (int h = 0; h < heads; ++h)
            for (int i = 0; i < area; ++i)
                for (int j = 0; j < area; ++j) {
                    const int y = i / wx - j / wx + wy - 1, x = i % wx - j % wx + wx - 1;
                    block.position_bias[(size_t(h) * area + i) * area + j] =
                        table[(size_t(y) * (2 * wx - 1) + x) * heads + h];
                }
    }

    NormNumbers norm(const std::string& path, int n) {
        NormNumbers found;
        if (!file_.has(path + ".weight")) return found;
        found.there = true, found.centred = !rms_, found.epsilon = epsilon_;
        if (!rms_) found.form = form_of(path, "layernorm");
        if (found.form != Integer::none && n > kMostNormed)
            throw Problem("'" + path + "' has too many channels for integers");
        found.weight = file_.floats(path + ".weight", n);
        found.bias = file_.has(path + ".bias") ? file_.floats(path + ".bias", n) : std::vector<float>(size_t(n), 0.0f);
        return found;
    }

    // One number for each of `count` heads, from one for all or one each.
    static std::vector<float> spread(const Site& site, const std::string& name, const char* key, int count) {
        const auto found = site.numbers.find(key);
        if (found == site.numbers.end()) return std::vector<float>(size_t(count), 0.0f);
        const auto& values = found->second.values;
        if (values.size() == size_t(count)) return values;
        if (values.size() != 1) throw Problem("'" + name + "' has a " + key + " for each channel");
        return std::vector<float>(size_t(count), values[0]);
    }

    // The grids of tokens that are no prefix tokens.
    static std::vector<Grid> grids_of(const Site& site, const std::string& name, int count, bool logarithmic = false) {
        if (site.low_width && site.share > 0)
            throw Problem("'" + name + "' has two groups of tokens that follow the image");
        static const char* const rounding[] = {"lsq", "dq", "edmips", "irm"};
        const bool uniform = std::find(std::begin(rounding), std::end(rounding), site.quantizer) != std::end(rounding);
        if (!uniform && !(logarithmic && (site.quantizer == "log2" || site.quantizer == "log-sqrt2")))
            throw Problem("'" + name + "' is quantized by '" + site.quantizer +
                          "', which the native engine does not know");
        if (site.widths.size() != 1 && site.widths.size() != size_t(count))
            throw Problem("'" + name + "' has widths that do not fit its heads");
        if (!site.low_width) return prefix_grids_of(site, name, count);
        const std::vector<int> widths(1, site.low_width);
        return made(site, name, widths, spread(site, name, "low_scale", count),
                    spread(site, name, "low_offset", count));
    }

    // The grids of prefix tokens.
    static std::vector<Grid> prefix_grids_of(const Site& site, const std::string& name, int count) {
        return made(site, name, site.widths, spread(site, name, "scale", count), spread(site, name, "offset", count));
    }

    static std::vector<Grid> made(const Site& site, const std::string& name, const std::vector<int>& widths,
                                  const std::vector<float>& scale, const std::vector<float>& offset) {
        std::vector<Grid> grids(scale.size());
        for (size_t i = 0; i < scale.size(); ++i) {
            const int width = widths[widths.size() > 1 ? i : 0];
            if (width > 8) throw Problem("'" + name + "' has more than 8 bits");
            grids[i] = {scale[i], 1.0f / scale[i], offset[i], site.low(width), site.high(width)};
        }
        return grids;
    }

    // A layer (n, k). `heads`: how many blocks of columns its weight may have, each with a scale; `factor`: what its
    // outputs are multiplied by, if the file has it.
    LayerNumbers layer(const std::string& path, const std::vector<std::string>& weights, const std::string& input,
                       int n, int k, int heads = 1, const std::string& factor = "") {
        LayerNumbers layer;
        layer.n = n, layer.k = k;
        if (k > kLongestSum) throw Problem("'" + path + "' sums over more than 32768 channels");
        const Site& activation = file_.site(input);
        auto several = [](const Site& site) {
            const auto& shape = site.numbers.at("scale").shape;
            return shape.size() == 2 && shape[0] > 1;
        };
        bool split = activation.widths.size() > 1 || activation.numbers.at("scale").values.size() > 1;
        for (const std::string& name : weights) split = split || (heads > 1 && several(file_.site(name)));
        layer.segments = split ? heads : 1;
        layer.grid = grids_of(activation, input, layer.segments);
        if (layer.segments > 1 && (k / layer.segments) % 4)
            throw Problem("'" + path + "' has heads that the native engine does not split");
        layer.scale.resize(size_t(layer.segments) * n);
        const int rows = n / int(weights.size()), part = k / layer.segments;
        for (size_t w = 0; w < weights.size(); ++w) {
            const Site& site = file_.site(weights[w]);
            static const char* const known[] = {"lsq", "dq", "edmips"};
            if (std::find(std::begin(known), std::end(known), site.quantizer) == std::end(known) ||
                site.numbers.count("offset"))
                throw Problem("'" + weights[w] + "' is a weight on a grid that the native engine does not know");
            const auto codes = file_.codes(weights[w], site, rows, k, heads > 1);
            layer.codes.insert(layer.codes.end(), codes.begin(), codes.end());
            const Numbers& scale = site.numbers.at("scale");
            const int64_t count = int64_t(scale.values.size());
            const bool by_columns = heads > 1 && scale.shape.size() == 2;
            if (count < 1 || (by_columns ? count != 1 && count != heads : rows % count != 0))
                throw Problem("'" + weights[w] + "' has scales that do not fit it");
            for (int s = 0; s < layer.segments; ++s)
                for (int r = 0; r < rows; ++r)
                    layer.scale[size_t(s) * n + w * rows + r] =
                        scale.values[by_columns ? (count > 1 ? s : 0) : r / (rows / count)];
        }
        layer.bias.assign(size_t(n), 0.0f);
        if (file_.has(path + ".bias")) layer.bias = file_.floats(path + ".bias", n);
        layer.splits = activation.low_width > 0;
        if (layer.splits && layer.segments > 1) throw Problem("'" + input + "' has two groups of tokens");
        if (layer.splits) {
            layer.prefix_grid = prefix_grids_of(activation, input, 1)[0];
            layer.prefix_scale = layer.scale, layer.prefix_bias = layer.bias;
        }
        for (int j = 0; j < n; ++j) {
            double bias = layer.bias[j];
            for (int s = 0; s < layer.segments; ++s) {
                int64_t sum = 0;
                for (int i = 0; i < part; ++i) sum += layer.codes[size_t(j) * k + s * part + i];
                const double by_offset = double(sum) * double(layer.scale[size_t(s) * n + j]);
                bias += double(layer.grid[s].offset) * by_offset;
                if (layer.splits)
                    layer.prefix_bias[j] = float(double(layer.prefix_bias[j]) + layer.prefix_grid.offset * by_offset);
            }
            layer.bias[j] = float(bias);
        }
        const bool multiplied = !factor.empty() && file_.has(factor);
        const std::vector<float> by = multiplied ? file_.floats(factor, n) : std::vector<float>(size_t(n), 1.0f);
        for (int j = 0; j < n; ++j) {
            if (layer.splits) {
                layer.prefix_scale[j] = layer.prefix_grid.scale * layer.prefix_scale[j] * by[j];
                layer.prefix_bias[j] *= by[j];
            }
            for (int s = 0; s < layer.segments; ++s)
                layer.scale[size_t(s) * n + j] = layer.grid[s].scale * layer.scale[size_t(s) * n + j] * by[j];
            layer.bias[j] *= by[j];
        }
        return layer;
    }

    int choice(const char* key, const std::vector<std::string>& known) {
        const Json& value = document_.at(key);
        const auto found = std::find(known.begin(), known.end(), value.text);
        if (!value.is(Json::Kind::text) || found == known.end())
            throw Problem("its network has the unknown " + std::string(key) + " '" + value.text + "'");
        return int(found - known.begin());
    }

    static std::vector<int> numbers(const Json& from, const char* key, size_t count, int most, int least = 1) {
        const Json& list = from.at(key);
        if (!list.is(Json::Kind::list) || list.items.size() != count)
            throw Problem("its network has an impossible " + std::string(key));
        std::vector<int> found;
        for (const Json& item : list.items) found.push_back(int(item.whole(least, most, key)));
        return found;
    }

    File& file_;
    const Json document_;
    std::map<std::string, std::string> forms_;
    std::set<std::string> used_;
    Network net_;
    bool swin_ = false, rms_ = false;
    float epsilon_ = 0;
};

}  // namespace qvit
