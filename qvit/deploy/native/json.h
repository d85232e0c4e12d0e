// JSON from strangers: strict, of bounded depth, names of an object once.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace qvit {

// What is wrong with a file or a call, as a sentence for people.
struct Problem : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Json {
    enum class Kind { null, boolean, number, text, list, object };
    Kind kind = Kind::null;
    bool truth = false;
    double number = 0;
    std::string text;
    std::vector<Json> items;
    std::vector<std::pair<std::string, Json>> members;  // in the order of the file

    bool is(Kind which) const { return kind == which; }
    const Json* find(std::string_view name) const {
        for (const auto& [key, value] : members)
            if (key == name) return &value;
        return nullptr;
    }
    const Json& at(std::string_view name) const {
        if (const Json* found = find(name)) return *found;
        throw Problem("it lacks the entry '" + std::string(name) + "'");
    }
    bool is_whole() const { return is(Kind::number) && number == std::floor(number) && std::abs(number) <= 9e15; }
    int64_t whole(int64_t least, int64_t most, const char* what) const {
        if (!is_whole() || number < double(least) || number > double(most))
            throw Problem(std::string(what) + " is no whole number from " + std::to_string(least) + " to " +
                          std::to_string(most));
        return int64_t(number);
    }
};

class JsonReader {
  public:
    static Json read(std::string_view text) {
        JsonReader reader(text);
        Json value = reader.value(0);
        reader.skip();
        if (reader.at_ != text.size()) reader.fail("there is more behind its end");
        return value;
    }

  private:
    explicit JsonReader(std::string_view text) : text_(text) {}

    static constexpr int kDeepest = 32;

    [[noreturn]] void fail(const char* why) const {
        throw Problem("its JSON cannot be read: " + std::string(why) + " (byte " + std::to_string(at_) + ")");
    }
    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
    void skip() {
        while (at_ < text_.size() && (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r')) ++at_;
    }
    void expect(char wanted) {
        if (peek() != wanted || at_ >= text_.size()) fail("a character is out of place");
        ++at_;
    }
    bool word(std::string_view wanted) {
        if (text_.substr(at_, wanted.size()) != wanted) return false;
        at_ += wanted.size();
        return true;
    }

    Json value(int depth) {
        if (depth > kDeepest) fail("it is nested too deep");
        skip();
        Json found;
        switch (peek()) {
            case '{': return object(depth);
            case '[': return list(depth);
            case '"': found.kind = Json::Kind::text, found.text = string(); return found;
            default: break;
        }
        if (word("null")) return found;
        found.kind = Json::Kind::boolean;
        if (word("true")) return found.truth = true, found;
        if (word("false")) return found;
        found.kind = Json::Kind::number, found.number = number();
        return found;
    }

    Json object(int depth) {
        Json found;
        found.kind = Json::Kind::object;
        expect('{');
        skip();
        if (peek() == '}') return ++at_, found;
        while (true) {
            skip();
            std::string key = string();
            skip();
            expect(':');
            found.members.emplace_back(std::move(key), value(depth + 1));
            skip();
            if (peek() != ',') break;
            ++at_;
        }
        expect('}');
        std::vector<std::string_view> keys;
        for (const auto& member : found.members) keys.push_back(member.first);
        std::sort(keys.begin(), keys.end());
        if (std::adjacent_find(keys.begin(), keys.end()) != keys.end()) fail("a name is there twice");
        return found;
    }

    Json list(int depth) {
        Json found;
        found.kind = Json::Kind::list;
        expect('[');
        skip();
        if (peek() == ']') return ++at_, found;
        while (true) {
            found.items.push_back(value(depth + 1));
            skip();
            if (peek() != ',') break;
            ++at_;
        }
        expect(']');
        return found;
    }

    double number() {
        const size_t begin = at_;
        auto digits = [&] {
            const size_t from = at_;
            while (peek() >= '0' && peek() <= '9') ++at_;
            if (at_ == from) fail("a value is missing");
            return at_ - from;
        };
        if (peek() == '-') ++at_;
        const bool zero = peek() == '0';
        if (digits() > 1 && zero) fail("a number begins with 0");
        if (peek() == '.') ++at_, digits();
        if (peek() == 'e' || peek() == 'E') {
            ++at_;
            if (peek() == '+' || peek() == '-') ++at_;
            digits();
        }
        std::istringstream stream{std::string(text_.substr(begin, at_ - begin))};
        stream.imbue(std::locale::classic());
        double found = 0;
        if (!(stream >> found) || !std::isfinite(found)) fail("a number is too large");
        return found;
    }

    unsigned four_digits() {
        unsigned found = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const char c = peek();
            const int digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
            if (digit < 0) fail("an escape is not complete");
            found = found * 16 + unsigned(digit);
        }
        return found;
    }

    void put(std::string& to, unsigned code) {
        if (code < 0x80) {
            to += char(code);
        } else if (code < 0x800) {
            to += char(0xC0 | code >> 6), to += char(0x80 | (code & 63));
        } else if (code < 0x10000) {
            to += char(0xE0 | code >> 12), to += char(0x80 | (code >> 6 & 63)), to += char(0x80 | (code & 63));
        } else {
            to += char(0xF0 | code >> 18), to += char(0x80 | (code >> 12 & 63));
            to += char(0x80 | (code >> 6 & 63)), to += char(0x80 | (code & 63));
        }
    }

    std::string string() {
        expect('"');
        std::string found;
        while (true) {
            if (at_ >= text_.size()) fail("a text has no end");
            const unsigned char c = static_cast<unsigned char>(text_[at_++]);
            if (c == '"') return found;
            if (c < 0x20) fail("a text holds a control character");
            if (c != '\\') {
                found += char(c);
                continue;
            }
            const char escape = peek();
            ++at_;
            switch (escape) {
                case '"':
                case '\\':
                case '/': found += escape; break;
                case 'b': found += '\b'; break;
                case 'f': found += '\f'; break;
                case 'n': found += '\n'; break;
                case 'r': found += '\r'; break;
                case 't': found += '\t'; break;
                case 'u': {
                    unsigned code = four_digits();
                    if (code >= 0xD800 && code < 0xDC00 && word("\\u")) {
                        const unsigned low = four_digits();
                        if (low < 0xDC00 || low > 0xDFFF) fail("a text is not Unicode");
                        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
                    } else if (code >= 0xD800 && code <= 0xDFFF) {
                        fail("a text is not Unicode");
                    }
                    put(found, code);
                    break;
                }
                default: fail("there is no such escape");
            }
        }
    }

    std::string_view text_;
    size_t at_ = 0;
};

}  // namespace qvit
