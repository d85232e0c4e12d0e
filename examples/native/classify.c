/* Classifies one image by a packed model, without Python.

   usage: classify MODEL.safetensors IMAGE.f32 [COUNT]

   IMAGE.f32 holds the image as raw float32 numbers, (channels, height, width), prepared as the file's `data_config`
   says; with several images in it, each is classified. Printed are the COUNT best classes (5) and their logits. */
#include <stdio.h>
#include <stdlib.h>

#include "qvit.h"

int main(int argc, char** argv) {
    if (argc < 3 || argc > 4) {
        fprintf(stderr, "usage: classify MODEL.safetensors IMAGE.f32 [COUNT]\n");
        return 2;
    }
    qvit_model* model = qvit_load(argv[1], 0);
    if (!model) {
        fprintf(stderr, "error: %s\n", qvit_error());
        return 1;
    }
    int shape[4], status = 1;
    qvit_shape(model, shape);
    const size_t size = (size_t)shape[0] * shape[1] * shape[2];
    float *image = malloc(size * sizeof(float)), *logits = malloc(shape[3] * sizeof(float));
    FILE* file = fopen(argv[2], "rb");
    if (!image || !logits || !file) {
        fprintf(stderr, "error: no image at %s\n", argv[2]);
        goto end;
    }
    int number = 0;
    for (; fread(image, sizeof(float), size, file) == size; ++number) {
        if (qvit_run(model, image, 1, logits)) {
            fprintf(stderr, "error: %s\n", qvit_error());
            goto end;
        }
        printf("image %d\n", number);
        for (int rank = 0; rank < (argc > 3 ? atoi(argv[3]) : 5) && rank < shape[3]; ++rank) {
            int best = 0;
            for (int c = 1; c < shape[3]; ++c)
                if (logits[c] > logits[best]) best = c;
            printf("%6d %12.6f\n", best, logits[best]);
            logits[best] = -1e30f;
        }
    }
    if (number == 0) fprintf(stderr, "error: %s holds less than an image of %d x %d x %d\n", argv[2], shape[0], shape[1], shape[2]);
    status = number == 0;
end:
    if (file) fclose(file);
    free(image), free(logits);
    qvit_free(model);
    return status;
}
