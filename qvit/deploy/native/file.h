// A packed file, read without trusting it: safetensors with a seal, texts of JSON, codes in bits.
//
// docs/packed-files.md has the format. What is wrong is a Problem, whatever the bytes; nothing is taken from the file
// that its checks do not cover. Each tensor and each site of the plan is asked for by whoever builds the network, and
// `require_all_used` refuses a file that holds more than was asked for.
#pragma once
#include <array>
#include <cstring>
#include <map>

#include "json.h"

namespace qvit {

inline std::array<uint8_t, 32> sha256(const std::vector<std::string_view>& parts) {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t block[64];
    size_t filled = 0;
    uint64_t total = 0;
    auto turn = [](uint32_t x, int by) {
        return x >> by | x << (32 - by);
    };
    auto mix = [&](const uint8_t* data) {
        uint32_t w[64];
        for (int i = 0; i < 16; ++i)
            w[i] = uint32_t(data[4 * i]) << 24 | uint32_t(data[4 * i + 1]) << 16 | uint32_t(data[4 * i + 2]) << 8 |
                   data[4 * i + 3];
        for (int i = 16; i < 64; ++i) {
            const uint32_t a = w[i - 15], b = w[i - 2];
            w[i] = w[i - 16] + (turn(a, 7) ^ turn(a, 18) ^ a >> 3) + w[i - 7] + (turn(b, 17) ^ turn(b, 19) ^ b >> 10);
        }
        uint32_t v[8];
        std::memcpy(v, h, sizeof(h));
        for (int i = 0; i < 64; ++i) {
            const uint32_t one = v[7] + (turn(v[4], 6) ^ turn(v[4], 11) ^ turn(v[4], 25)) +
                                 ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
            const uint32_t two =
                (turn(v[0], 2) ^ turn(v[0], 13) ^ turn(v[0], 22)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
            for (int j = 7; j > 0; --j) v[j] = v[j - 1];
            v[4] += one, v[0] = one + two;
        }
        for (int i = 0; i < 8; ++i) h[i] += v[i];
    };
    auto add = [&](const uint8_t* data, size_t size) {
        total += size;
        while (size) {
            if (filled == 0 && size >= 64) {
                mix(data), data += 64, size -= 64;
                continue;
            }
            const size_t count = std::min(size, 64 - filled);
            std::memcpy(block + filled, data, count);
            filled += count, data += count, size -= count;
            if (filled == 64) mix(block), filled = 0;
        }
    };
    for (std::string_view part : parts) add(reinterpret_cast<const uint8_t*>(part.data()), part.size());
    const uint64_t bits = total * 8;
    const uint8_t one = 0x80, zero = 0;
    add(&one, 1);
    while (filled != 56) add(&zero, 1);
    uint8_t length[8];
    for (int i = 0; i < 8; ++i) length[i] = uint8_t(bits >> (56 - 8 * i));
    add(length, 8);
    std::array<uint8_t, 32> found;
    for (int i = 0; i < 32; ++i) found[i] = uint8_t(h[i / 4] >> (24 - 8 * (i % 4)));
    return found;
}

inline bool is_utf8(std::string_view text) {
    for (size_t i = 0; i < text.size();) {
        const unsigned char c = static_cast<unsigned char>(text[i]);
        const int more = c < 0x80                ? 0
                         : c >= 0xC2 && c < 0xE0 ? 1
                         : c >= 0xE0 && c < 0xF0 ? 2
                         : c >= 0xF0 && c < 0xF5 ? 3
                                                 : -1;
        if (more < 0 || i + size_t(more) >= text.size()) return false;
        uint32_t code = more == 0 ? c : c & (0x3F >> more);
        for (int j = 1; j <= more; ++j) {
            const unsigned char next = static_cast<unsigned char>(text[i + j]);
            if ((next & 0xC0) != 0x80) return false;
            code = code << 6 | (next & 0x3F);
        }
        if ((more == 2 && (code < 0x800 || (code >= 0xD800 && code < 0xE000))) ||
            (more == 3 && (code < 0x10000 || code > 0x10FFFF)))
            return false;
        i += size_t(more) + 1;
    }
    return true;
}

struct Stored {
    std::string type;
    std::vector<int64_t> shape;
    const uint8_t* data = nullptr;
    int64_t bytes = 0, count = 0;
    bool used = false;
};

// Numbers of a site's grid, with the shape that the plan gives them.
struct Numbers {
    std::vector<int64_t> shape;
    std::vector<float> values;
};

// What the plan says of one tensor.
struct Site {
    bool there = false;  // else it stays in float
    std::vector<int> widths;
    bool is_signed = true;
    double share = 0;   // of the tokens that have `widths`; the others have `low_width`
    int low_width = 0;  // 0: all tokens have the same
    std::string quantizer = "lsq";
    std::map<std::string, Numbers> numbers;
    bool used = false;

    int low(int width) const { return is_signed ? -(1 << (width - 1)) : 0; }
    int high(int width) const { return is_signed ? (1 << (width - 1)) - 1 : (1 << width) - 1; }
};

class File {
  public:
    std::map<std::string, std::string> texts;

    // The bytes must live as long as the file is asked for tensors.
    File(const uint8_t* bytes, size_t size) {
        if (size < 10) throw Problem("it is no safetensors file, or it was cut off");
        uint64_t length = 0;
        for (int i = 7; i >= 0; --i) length = length << 8 | bytes[i];
        if (length < 2 || length > size - 8) throw Problem("it is no safetensors file, or it was cut off");
        if (length > kLongestHeader) throw Problem("its header takes " + std::to_string(length) + " bytes");
        const std::string_view all(reinterpret_cast<const char*>(bytes), size), header = all.substr(8, length);
        check_seal(all, header);
        if (!is_utf8(header)) throw Problem("its header is not UTF-8");
        const Json document = JsonReader::read(header);
        if (!document.is(Json::Kind::object)) throw Problem("its header is no JSON object");
        read_tensors(document, bytes + 8 + length, int64_t(size - 8 - length));
        check_texts();
        read_plan(JsonReader::read(texts.at("plan")));
    }

    // The description of the network. Raises Problem where the file has none.
    Json network() const {
        Json found = JsonReader::read(texts.at("network"));
        if (found.is(Json::Kind::null)) throw Problem("it is a model that the native engine does not run");
        return found;
    }

    const Site* find_site(const std::string& name) {
        const auto found = sites_.find(name);
        if (found == sites_.end()) return nullptr;
        found->second.used = true;
        return &found->second;
    }
    const Site& site(const std::string& name) {
        const Site* found = find_site(name);
        if (!found) throw Problem("its plan lacks the site '" + name + "'");
        if (!found->there) throw Problem("'" + name + "' stays in float");
        return *found;
    }

    bool has(const std::string& name) const { return tensors_.count(name) > 0; }

    // A float32 tensor of `count` finite numbers.
    std::vector<float> floats(const std::string& name, int64_t count) {
        Stored& found = take(name, "F32");
        if (found.count != count)
            throw Problem("tensor '" + name + "' has " + std::to_string(found.count) + " numbers, not " +
                          std::to_string(count));
        return numbers_in(found, name);
    }
    int64_t count(const std::string& name) {
        const auto found = tensors_.find(name);
        return found == tensors_.end() ? 0 : found->second.count;
    }

    // The codes (rows, columns) of a weight; its heads are blocks of columns, or of rows.
    std::vector<int8_t> codes(const std::string& name, const Site& site, int rows, int columns, bool by_columns) {
        const Stored& found = take(name + ".packed", "U8");
        const int heads = int(site.widths.size());
        if ((by_columns ? columns : rows) % heads)
            throw Problem("site '" + name + "' has widths of heads that do not fit it");
        const int64_t each = int64_t(rows) * columns / heads;
        int64_t bits = 0;
        for (int width : site.widths) bits += each * width;
        if (found.shape.size() != 1 || found.bytes != (bits + 7) / 8)
            throw Problem("site '" + name + "' has " + std::to_string(found.bytes) + " bytes of codes, not " +
                          std::to_string((bits + 7) / 8));
        if (bits % 8 && found.data[found.bytes - 1] >> (bits % 8))
            throw Problem("the bits after the last code of '" + name + "' are not zero");
        std::vector<int8_t> codes(size_t(rows) * columns);
        int64_t place = 0;
        for (int h = 0; h < heads; ++h) {
            const int width = site.widths[h], low = site.low(width);
            if (site.high(width) > 127) throw Problem("site '" + name + "' has weights on a grid without zero");
            const int64_t part = columns / heads;
            for (int64_t i = 0; i < each; ++i, place += width) {
                const int64_t byte = place >> 3;
                unsigned value = found.data[byte];
                if ((place & 7) + width > 8) value |= unsigned(found.data[byte + 1]) << 8;
                const int code = int(value >> (place & 7) & ((1u << width) - 1)) + low;
                codes[by_columns ? (i / part) * columns + h * part + i % part : h * each + i] = int8_t(code);
            }
        }
        return codes;
    }

    void require_all_used() const {
        for (const auto& [name, stored] : tensors_)
            if (!stored.used) throw Problem("it has the tensor '" + name + "', which its network has no use for");
        for (const auto& [name, site] : sites_)
            if (!site.used) throw Problem("its plan has the site '" + name + "', which its network lacks");
    }

  private:
    static constexpr size_t kLongestHeader = 4 << 20;
    static constexpr int kMostSites = 20000, kMostHeads = 1024;
    static constexpr float kLargest = 16777216.0f, kSmallestScale = 1e-8f;

    Stored& take(const std::string& name, const char* type) {
        const auto found = tensors_.find(name);
        if (found == tensors_.end()) throw Problem("it lacks the tensor '" + name + "'");
        if (found->second.type != type)
            throw Problem("tensor '" + name + "' is of type " + found->second.type + ", not " + type);
        found->second.used = true;
        return found->second;
    }

    static std::vector<float> numbers_in(const Stored& stored, const std::string& name) {
        std::vector<float> found(size_t(stored.count));
        if (!found.empty()) std::memcpy(found.data(), stored.data, size_t(stored.bytes));
        for (float value : found)
            if (!(std::abs(value) <= kLargest))
                throw Problem("tensor '" + name + "' has NaN or infinite values, or some beyond 2^24");
        return found;
    }

    static void check_seal(std::string_view all, std::string_view header) {
        static const std::string_view key = "\"sha256\":\"";
        size_t place = std::string_view::npos;
        for (size_t i = header.find(key); i != std::string_view::npos; i = header.find(key, i + 1)) {
            const size_t begin = i + key.size();
            if (begin + 65 > header.size() || header[begin + 64] != '"') continue;
            const std::string_view digits = header.substr(begin, 64);
            if (digits.find_first_not_of("0123456789abcdef") != std::string_view::npos) continue;
            if (place != std::string_view::npos) throw Problem("it has two checksums");
            place = begin + 8;
        }
        if (place == std::string_view::npos)
            throw Problem("it has no checksum of a packed model; `qvit pack RUN` writes one");
        const std::string zeros(64, '0');
        const auto digest = sha256({all.substr(0, place), zeros, all.substr(place + 64)});
        for (int i = 0; i < 64; ++i)
            if ("0123456789abcdef"[digest[i / 2] >> (i % 2 ? 0 : 4) & 15] != all[place + i])
                throw Problem("it is damaged: its content does not have the checksum in its header");
    }

    void read_tensors(const Json& document, const uint8_t* data, int64_t available) {
        static const std::map<std::string, int> sizes = {{"F64", 8},  {"I64", 8}, {"F32", 4}, {"I32", 4}, {"F16", 2},
                                                         {"BF16", 2}, {"I16", 2}, {"I8", 1},  {"U8", 1},  {"BOOL", 1}};
        std::vector<std::pair<int64_t, int64_t>> places;
        for (const auto& [name, entry] : document.members) {
            if (name == "__metadata__") {
                for (const auto& [key, value] : entry.members) {
                    if (!value.is(Json::Kind::text)) throw Problem("its metadata are not texts by key");
                    texts[key] = value.text;
                }
                continue;
            }
            if (entry.members.size() != 3)
                throw Problem("tensor '" + name + "' is not described by dtype, shape and data_offsets");
            const Json &type = entry.at("dtype"), &shape = entry.at("shape"), &offsets = entry.at("data_offsets");
            const auto size = sizes.find(type.text);
            if (!type.is(Json::Kind::text) || size == sizes.end())
                throw Problem("tensor '" + name + "' has an unknown type");
            if (!shape.is(Json::Kind::list) || shape.items.size() > 8)
                throw Problem("tensor '" + name + "' has an impossible shape");
            Stored stored;
            stored.type = type.text, stored.count = 1;
            for (const Json& length : shape.items) {
                stored.shape.push_back(length.whole(0, int64_t(1) << 40, "a length in a shape"));
                if (stored.count && stored.shape.back() > (int64_t(1) << 40) / stored.count)
                    throw Problem("tensor '" + name + "' has an impossible shape");
                stored.count *= stored.shape.back();
            }
            if (!offsets.is(Json::Kind::list) || offsets.items.size() != 2)
                throw Problem("tensor '" + name + "' has impossible offsets");
            const int64_t begin = offsets.items[0].whole(0, available, "an offset"),
                          end = offsets.items[1].whole(0, available, "an offset");
            if (end - begin != stored.count * size->second)
                throw Problem("tensor '" + name + "' has bytes that its shape and type do not take");
            stored.data = data + begin, stored.bytes = end - begin;
            places.emplace_back(begin, end);
            tensors_[name] = std::move(stored);
        }
        std::sort(places.begin(), places.end());
        int64_t position = 0;
        for (const auto& [begin, end] : places) {
            if (begin != position) throw Problem("its tensors overlap, or there is a gap between them");
            position = end;
        }
        if (position != available)
            throw Problem("its tensors take " + std::to_string(position) + " bytes, and there are " +
                          std::to_string(available));
    }

    void check_texts() {
        texts.erase("sha256");
        const auto format = texts.find("format"), version = texts.find("version");
        if (format == texts.end() || format->second != "qvit")
            throw Problem("it is no packed model: `qvit pack RUN` writes one");
        if (version != texts.end() && version->second == "1")
            throw Problem(
                "it is of format 1, which does not say how its network is built: `qvit.Artifact.load(FILE).save(FILE)` "
                "brings it up to date");
        if (version == texts.end() || version->second != "2")
            throw Problem("it is of a format that this engine does not know: update qvit");
        static const char* const keys[] = {"class_names", "data_config", "format",     "model",
                                           "network",     "plan",        "provenance", "version"};
        for (const char* key : keys)
            if (!texts.count(key)) throw Problem("its metadata lack the key '" + std::string(key) + "'");
        if (texts.size() != std::size(keys)) throw Problem("its metadata have an unknown key");
    }

    void read_plan(const Json& plan) {
        const Json &kinds = plan.at("kinds"), &sites = plan.at("sites");
        if (!kinds.is(Json::Kind::list) || !sites.is(Json::Kind::object))
            throw Problem("the plan has no list of kinds and no object of sites");
        std::vector<Site> known;
        for (const Json& kind : kinds.items) known.push_back(read_kind(kind));
        std::vector<std::vector<std::string>> orders;  // of the numbers of each kind, in the file's order
        for (const Json& kind : kinds.items) {
            orders.emplace_back();
            for (const auto& [key, value] : kind.members)
                if (known[orders.size() - 1].numbers.count(key)) orders.back().push_back(key);
        }
        std::map<std::string, int> found;
        auto put = [&](const std::string& name, int64_t index) {
            if (index < 0 || index >= int64_t(known.size()))
                throw Problem("site '" + name + "' of the plan is of no kind that is listed");
            if (!found.emplace(name, int(index)).second) throw Problem("site '" + name + "' is in the plan twice");
            if (found.size() > kMostSites) throw Problem("the plan has too many sites");
        };
        for (const auto& member : sites.members) {
            const std::string& key = member.first;
            const Json& value = member.second;
            if (value.is(Json::Kind::number)) {
                put(key, value.whole(0, kMostSites, "the kind of a site"));
                continue;
            }
            const size_t sign = key.find('#');
            if (sign == std::string::npos || key.find('#', sign + 1) != std::string::npos)
                throw Problem("the sites '" + key + "' of the plan have no place for a number");
            auto numbered = [&](size_t number) {
                return key.substr(0, sign) + std::to_string(number) + key.substr(sign + 1);
            };
            if (value.is(Json::Kind::list)) {
                for (size_t i = 0; i < value.items.size(); ++i)
                    put(numbered(i), value.items[i].whole(0, kMostSites, "the kind of a site"));
            } else {
                const size_t star = value.text.find('*');
                const auto number = [&](const std::string& text) {
                    if (text.empty() || text.size() > 5 || text.find_first_not_of("0123456789") != std::string::npos)
                        throw Problem("site '" + key + "' of the plan is of no kind that is listed");
                    return std::stoi(text);
                };
                if (!value.is(Json::Kind::text) || star == std::string::npos)
                    throw Problem("site '" + key + "' of the plan is of no kind that is listed");
                const int times = number(value.text.substr(0, star)), index = number(value.text.substr(star + 1));
                for (int i = 0; i < times; ++i) put(numbered(size_t(i)), index);
            }
        }
        const std::vector<float> scales = numbers_in(take("scales", "F32"), "scales");
        size_t at = 0;
        for (const auto& [name, index] : found) {
            Site site = known[size_t(index)];
            for (const std::string& key : orders[size_t(index)]) {
                Numbers& numbers = site.numbers[key];
                int64_t count = 1;
                for (int64_t length : numbers.shape) count *= length;
                if (count > int64_t(scales.size() - at)) throw Problem("it has fewer scales than its plan asks for");
                numbers.values.assign(scales.begin() + int64_t(at), scales.begin() + int64_t(at) + count);
                at += size_t(count);
                if (key == "scale" || key == "low_scale")
                    for (float value : numbers.values)
                        if (!(value >= kSmallestScale))
                            throw Problem("the scale of site '" + name + "' is not positive");
            }
            sites_[name] = std::move(site);
        }
        if (at != scales.size()) throw Problem("it has more scales than its plan asks for");
    }

    static Site read_kind(const Json& kind) {
        Site site;
        if (kind.is(Json::Kind::null)) return site;
        if (!kind.is(Json::Kind::object)) throw Problem("a kind of site in the plan is no object");
        site.there = true, site.widths = {8};
        for (const auto& [key, value] : kind.members) {
            if (key == "bit_width") {
                site.widths.clear();
                const std::vector<Json> one{value};
                for (const Json& width : value.is(Json::Kind::list) ? value.items : one)
                    site.widths.push_back(int(width.whole(1, 16, "a width")));
                if (site.widths.empty() || site.widths.size() > size_t(kMostHeads))
                    throw Problem("a kind of site in the plan has no widths");
            } else if (key == "signed") {
                if (!value.is(Json::Kind::boolean)) throw Problem("'signed' in the plan is neither true nor false");
                site.is_signed = value.truth;
            } else if (key == "granularity") {
                if (value.text == "per-position")
                    throw Problem("a kind of site in the plan has a scale for each position of a token");
            } else if (key == "quantizer") {
                site.quantizer = value.text;
            } else if (key == "token_bit_width") {
                if (value.is(Json::Kind::null)) continue;
                const Json& share = value.at("share");
                if (!share.is(Json::Kind::number) || !(share.number >= 0 && share.number <= 1))
                    throw Problem("a kind of site in the plan has an impossible share of tokens");
                site.share = share.number, site.low_width = int(value.at("low").whole(1, 16, "a width"));
            } else if (key == "learn_bit_width") {
                if (value.truth) throw Problem("the width of a kind of site is still to be learned");
            } else if (value.is(Json::Kind::list) && key != "bit_width_range") {
                if (value.items.size() > 8) throw Problem("the " + key + " of a kind of site has no shape");
                Numbers numbers;
                for (const Json& length : value.items)
                    numbers.shape.push_back(length.whole(0, 1 << 24, "a length in a shape"));
                int64_t count = 1;
                for (int64_t length : numbers.shape)
                    if ((count *= length) > 1 << 24) throw Problem("the " + key + " of a kind of site has no shape");
                site.numbers[key] = std::move(numbers);
            }
        }
        if (!site.numbers.count("scale")) throw Problem("a kind of site in the plan has no scale");
        for (int width : site.widths)
            if ((width == 1 || site.low_width == 1) && site.is_signed)
                throw Problem("a width of 1 on a signed grid has no positive level");
        if (site.low_width && !site.numbers.count("low_scale"))
            throw Problem("a kind of site in the plan has two groups of tokens and one scale");
        return site;
    }

    std::map<std::string, Stored> tensors_;
    std::map<std::string, Site> sites_;
};

}  // namespace qvit
