/* Runs packed models of qvit: images in, logits or features out. No dependency but the C++ runtime.

   qvit_model* model = qvit_load("packed.safetensors", 0);
   if (!model) puts(qvit_error());
   qvit_run(model, images, batch, answers);
   qvit_free(model);

   Functions that can fail return NULL or 1, and qvit_error() says why, for the calling thread. A model may be used by
   several threads; calls wait for one another. Images are float32, (batch, channels, height, width), prepared as the
   file's `data_config` says (qvit_text). */
#ifndef QVIT_H
#define QVIT_H
#include <stddef.h>

#if defined(__GNUC__)
#define QVIT_API __attribute__((visibility("default")))
#else
#define QVIT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qvit_model qvit_model;

/* A packed file, run by so many threads; 0: one for each processor that this process may use. */
QVIT_API qvit_model* qvit_load(const char* path, int threads);

/* The same from memory, which may be freed afterwards. form: how products are computed, one of qvit_form; NULL: the
   fastest that this processor has. */
QVIT_API qvit_model* qvit_load_bytes(const void* bytes, size_t size, int threads, const char* form);

/* channels, height, width of an image; numbers of its answer */
QVIT_API void qvit_shape(const qvit_model* model, int shape[4]);

/* The shape of an image's answer, and of how many sides it is: (classes); without a classifier (channels); of a model
   that does not pool its tokens, (tokens, ...) or (rows, columns, ...). */
QVIT_API int qvit_answer(const qvit_model* model, int shape[3]);

/* answers: (batch, ...) */
QVIT_API int qvit_run(qvit_model* model, const float* images, int batch, float* answers);

QVIT_API void qvit_free(qvit_model* model);

/* What went wrong in this thread's last call that failed. */
QVIT_API const char* qvit_error(void);

/* A text of the file's metadata, JSON in UTF-8: `class_names`, `data_config`, `plan`, `model`, `provenance`. NULL if
   there is none. It lives as long as the model. */
QVIT_API const char* qvit_text(const qvit_model* model, const char* key);

/* The forms of products that this processor has, the fastest first; NULL behind the last. */
QVIT_API const char* qvit_form(int index);
QVIT_API const char* qvit_form_of(const qvit_model* model);

/* One run, with the seconds that each kind of kernel takes; a thread's mean. Kinds: qvit_kind, NULL behind the last. */
QVIT_API int qvit_profile(qvit_model* model, const float* images, int batch, float* answers, double* seconds);
QVIT_API const char* qvit_kind(int index);

/* Whether every form of this processor multiplies exactly, at the ends of all ranges; the tests' and loaders' probe. */
QVIT_API int qvit_probe(void);

/* One product by itself: out (m, n) of bytes a (m, k), stored from 0 on a grid from `low`, and w (n, k). */
QVIT_API int qvit_multiply(const char* form, int m, int n, int k, const unsigned char* a, int low, int most_left,
                           const signed char* w, int* out);

/* A function on integers by itself: `layernorm` (without weight and bias), `softmax` or `gelu` of rows (rows, n) in fixed
   point, by the form `i-bert`, `i-vit` or `fq-vit`. */
QVIT_API int qvit_function(const char* form, const char* operation, const char* name, int rows, int n, const int* x,
                           int* out);

/* The digest of the sources that this library was made of; empty if nobody said so when it was compiled. */
QVIT_API const char* qvit_sources(void);

#ifdef __cplusplus
}
#endif
#endif
