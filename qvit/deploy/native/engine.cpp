// The native engine: a packed model without Python and PyTorch. qvit.h is what others see of it.
//
//   file.h      bytes -> tensors, sites, texts          json.h     JSON from strangers
//   network.h   a file -> layers, norms, heads          memory.h   buffers and threads
//   kernels.h   products of integers                    lanes.h    floats, sixteen at a time
//   integers.h  LayerNorm, softmax, GELU without floats
//   model.h     images -> answers                       attention.h  of it, what the heads do
//
// The last five are compiled once for each instruction set, in a namespace of its own; which one runs is decided when
// a model is loaded. Code of the standard library stays outside: it is the same for all processors.
#include "qvit.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#define QVIT_FORKS 1
#endif
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC warns of its own _mm512_undefined_ps
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <cpuid.h>
#include <immintrin.h>
#define QVIT_X86 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#define QVIT_ARM 1
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#include "memory.h"
#include "network.h"

namespace qvit {

enum Kind { kEmbedding, kNorm, kQkv, kAttention, kProj, kFirst, kSecond, kMerging, kHead, kWaiting, kKinds };
const char* const kind_names[kKinds] = {"patch embedding", "layernorm", "qkv",           "attention", "proj",
                                        "fc1+activation",  "fc2",       "patch merging", "head",      "waiting"};

class Runner {
  public:
    virtual ~Runner() = default;
    virtual void run(const float* images, int batch, float* answers) = 0;
    virtual void profile(const float* images, int batch, float* answers, double* seconds) = 0;
    virtual void after_fork() = 0;
};

enum class Function { norm, softmax, gelu };

// What each instruction set offers.
struct Form {
    const char* name;
    bool (*supported)();
    std::unique_ptr<Runner> (*make)(const Network&, int threads);
    void (*product)(int m, int n, int k, const uint8_t* a, int low, int most_left, const int8_t* w, int32_t* out);
    void (*function)(Function, Integer, int rows, int n, const int32_t* x, int32_t* out);
};

}  // namespace qvit

#if defined(__clang__)
#define QVIT_TARGET_BEGIN(clang_features, gcc_features) \
    _Pragma(QVIT_TEXT(clang attribute push(__attribute__((target(clang_features))), apply_to = function)))
#define QVIT_TARGET_END _Pragma("clang attribute pop")
#else
#define QVIT_TARGET_BEGIN(clang_features, gcc_features) \
    _Pragma("GCC push_options") _Pragma(QVIT_TEXT(GCC target(gcc_features)))
#define QVIT_TARGET_END _Pragma("GCC pop_options")
#endif
#define QVIT_TEXT(...) #__VA_ARGS__
#define QVIT_TEXT_OF(...) QVIT_TEXT(__VA_ARGS__)

#if defined(QVIT_X86)

QVIT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma",
                  "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,prefer-vector-width=512")
namespace qvit::avx512_vnni {
#define QVIT_AVX512_VNNI
#define QVIT_FMA
#define QVIT_SHUFFLES
#include "kernels.h"
#include "lanes.h"
#include "model.h"
#include "attention.h"
#include "form.h"
#undef QVIT_SHUFFLES
#undef QVIT_FMA
#undef QVIT_AVX512_VNNI
}  // namespace qvit::avx512_vnni
QVIT_TARGET_END

#if defined(QVIT_EVEX)
QVIT_TARGET_BEGIN("avx512f,avx512vl,avx512vnni,avx2,fma",
                  "avx512f,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=256")
#else
QVIT_TARGET_BEGIN("avx2,fma", "avx2,fma")
#endif
namespace qvit::avx_vnni {
#define QVIT_AVX_VNNI
#define QVIT_FMA
#define QVIT_SHUFFLES
#include "kernels.h"
#include "lanes.h"
#include "model.h"
#include "attention.h"
#include "form.h"
#undef QVIT_SHUFFLES
#undef QVIT_FMA
#undef QVIT_AVX_VNNI
}  // namespace qvit::avx_vnni
QVIT_TARGET_END

QVIT_TARGET_BEGIN("avx2,fma", "avx2,fma")
namespace qvit::avx2 {
#define QVIT_AVX2
#define QVIT_FMA
#define QVIT_SHUFFLES
#include "kernels.h"
#include "lanes.h"
#include "model.h"
#include "attention.h"
#include "form.h"
#undef QVIT_SHUFFLES
#undef QVIT_FMA
#undef QVIT_AVX2
}  // namespace qvit::avx2
QVIT_TARGET_END

#elif defined(QVIT_ARM)

QVIT_TARGET_BEGIN("dotprod", "arch=armv8.2-a+dotprod")
namespace qvit::dot {
#define QVIT_DOT
#define QVIT_FMA
#include "kernels.h"
#include "lanes.h"
#include "model.h"
#include "attention.h"
#include "form.h"
#undef QVIT_FMA
#undef QVIT_DOT
}  // namespace qvit::dot
QVIT_TARGET_END

#endif

namespace qvit::portable {
#include "kernels.h"
#include "lanes.h"
#include "model.h"
#include "attention.h"
#include "form.h"
}  // namespace qvit::portable

namespace qvit {
namespace {

#if defined(QVIT_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512_vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
bool has_avx_vnni() {
#if defined(QVIT_EVEX)
    return has_avx512_vnni();
#else
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#endif
}
#elif defined(QVIT_ARM)
bool has_dot() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    return true;
#else
    return false;
#endif
}
#endif
bool always() { return true; }

// The fastest first.
const Form all_forms[] = {
#if defined(QVIT_X86)
    {"AVX-512 VNNI", has_avx512_vnni, avx512_vnni::make, avx512_vnni::product, avx512_vnni::function},
    {"AVX-VNNI", has_avx_vnni, avx_vnni::make, avx_vnni::product, avx_vnni::function},
    {"AVX2", has_avx2, avx2::make, avx2::product, avx2::function},
#elif defined(QVIT_ARM)
    {"NEON dot", has_dot, dot::make, dot::product, dot::function},
#endif
    {"portable", always, portable::make, portable::product, portable::function},
};

const Form* form_at(int index) {
    for (const Form& form : all_forms)
        if (form.supported() && index-- == 0) return &form;
    return nullptr;
}

const Form& form_named(const char* name) {
    if (!name) return *form_at(0);
    std::string there;
    for (int i = 0; const Form* form = form_at(i); ++i) {
        if (!std::strcmp(form->name, name)) return *form;
        there += (i ? ", " : "") + std::string(form->name);
    }
    throw Problem("this processor has no form '" + std::string(name) + "' of the native engine: " + there);
}

thread_local std::string problem;

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

int processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof(set), &set)) return std::max(1, CPU_COUNT(&set));
#endif
    return std::max(1, int(std::thread::hardware_concurrency()));
}

std::vector<uint8_t> bytes_of(const char* path) {
    const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path, "rb"), std::fclose);
    if (!file) throw Problem("no packed model at " + std::string(path));
    std::vector<uint8_t> bytes;
    uint8_t part[1 << 16];
    while (const size_t count = std::fread(part, 1, sizeof(part), file.get()))
        bytes.insert(bytes.end(), part, part + count);
    if (std::ferror(file.get())) throw Problem("cannot read " + std::string(path));
    return bytes;
}

constexpr int kMostBatch = 1 << 16, kMostThreads = 1024;

}  // namespace
}  // namespace qvit

using namespace qvit;

struct qvit_model {
    std::map<std::string, std::string> texts;
    int shape[4];
    std::vector<int> answer;
    const Form* form;
    std::unique_ptr<Runner> runner;
    std::mutex busy;
#if QVIT_FORKS
    pid_t process = getpid();
#endif

    // In a child of `fork` whoever held the lock is not there.
    void after_fork() {
#if QVIT_FORKS
        if (process == getpid()) return;
        new (&busy) std::mutex;
        runner->after_fork();
        process = getpid();
#endif
    }

    template <class F>
    int use(int batch, F&& work) {
        return guarded([&] {
            if (batch < 1 || batch > kMostBatch) throw Problem("a batch has 1 to 65536 images");
            after_fork();
            std::lock_guard<std::mutex> lock(busy);
            work();
        });
    }
};

extern "C" {

qvit_model* qvit_load_bytes(const void* bytes, size_t size, int threads, const char* form) {
    std::unique_ptr<qvit_model> model;
    const int failed = guarded([&] {
        if (threads < 0 || threads > kMostThreads)
            throw Problem("a model is run by 1 to 1024 threads; 0: one for each processor");
        File file(static_cast<const uint8_t*>(bytes), size);
        const Network network = NetworkReader::read(file);
        model = std::make_unique<qvit_model>();
        model->answer = network.answer();
        int numbers = 1;
        for (int side : model->answer) numbers *= side;
        const int shape[] = {network.channels, network.side_y, network.side_x, numbers};
        std::copy_n(shape, 4, model->shape);
        model->texts = std::move(file.texts);
        model->form = &form_named(form);
        model->runner = model->form->make(network, threads ? threads : processors());
    });
    return failed ? nullptr : model.release();
}

qvit_model* qvit_load(const char* path, int threads) {
    std::vector<uint8_t> bytes;
    if (guarded([&] { bytes = bytes_of(path); })) return nullptr;
    qvit_model* model = qvit_load_bytes(bytes.data(), bytes.size(), threads, nullptr);
    if (!model) problem = "cannot load " + std::string(path) + ": " + problem;
    return model;
}

void qvit_shape(const qvit_model* model, int shape[4]) { std::copy_n(model->shape, 4, shape); }

int qvit_answer(const qvit_model* model, int shape[3]) {
    std::copy(model->answer.begin(), model->answer.end(), shape);
    return int(model->answer.size());
}

int qvit_run(qvit_model* model, const float* images, int batch, float* answers) {
    return model->use(batch, [&] { model->runner->run(images, batch, answers); });
}

int qvit_profile(qvit_model* model, const float* images, int batch, float* answers, double* seconds) {
    return model->use(batch, [&] { model->runner->profile(images, batch, answers, seconds); });
}

void qvit_free(qvit_model* model) {
    if (model) model->after_fork();
    delete model;
}

const char* qvit_error(void) { return problem.c_str(); }

const char* qvit_text(const qvit_model* model, const char* key) {
    const auto found = model->texts.find(key);
    return found == model->texts.end() ? nullptr : found->second.c_str();
}

const char* qvit_form(int index) {
    const Form* form = index < 0 ? nullptr : form_at(index);
    return form ? form->name : nullptr;
}

const char* qvit_form_of(const qvit_model* model) { return model->form->name; }

const char* qvit_kind(int index) { return index >= 0 && index < kKinds ? kind_names[index] : nullptr; }

int qvit_multiply(const char* form, int m, int n, int k, const unsigned char* a, int low, int most_left,
                  const signed char* w, int* out) {
    return guarded([&] { form_named(form).product(m, n, k, a, low, most_left, w, out); });
}

int qvit_function(const char* form, const char* operation, const char* name, int rows, int n, const int* x, int* out) {
    return guarded([&] {
        const std::string what = operation, how = name;
        const auto which = what == "layernorm" ? Function::norm : what == "softmax" ? Function::softmax
                                                                                    : Function::gelu;
        const auto whole = how == "i-bert" ? Integer::ibert : how == "i-vit" ? Integer::ivit : Integer::fqvit;
        form_named(form).function(which, whole, rows, n, x, out);
    });
}

int qvit_probe(void) {
    return guarded([] {
        constexpr int m = 7, n = 33, k = 260;
        std::vector<uint8_t> a(m * k);
        std::vector<int8_t> w(n * k);
        std::vector<int32_t> found(m * n);
        for (int i = 0; const Form* form = form_at(i); ++i)
            for (int left : {3, 15, 255})
                for (int right : {1, 7, 127, 128})
                    for (int way = 0; way < 4; ++way) {
                        for (int j = 0; j < m * k; ++j) a[j] = uint8_t(way & 1 && j % 2 ? 0 : left);
                        for (int j = 0; j < n * k; ++j)
                            w[j] = int8_t(way & 2 && j % 3 == 0 ? std::min(right, 127) : -right);
                        form->product(m, n, k, a.data(), -(left + 1) / 2, left, w.data(), found.data());
                        for (int r = 0; r < m; ++r)
                            for (int c = 0; c < n; ++c) {
                                int32_t sum = 0;
                                for (int j = 0; j < k; ++j)
                                    sum += (int(a[r * k + j]) - (left + 1) / 2) * int(w[c * k + j]);
                                if (sum != found[r * n + c])
                                    throw Problem("form '" + std::string(form->name) +
                                                  "' does not multiply exactly on this processor");
                            }
                    }
    });
}

const char* qvit_sources(void) {
#if defined(QVIT_SOURCES)
    return QVIT_TEXT_OF(QVIT_SOURCES);
#else
    return "";
#endif
}

}  // extern "C"
