/*
 * Runs a harness on files, without libFuzzer: gcc is enough. Each argument is a file, which is
 * named before its turn, so that the last one named is the one that crashed.
 */

#include "harness.h"

int main(int count, char **names) {
    for (int i = 1; i < count; i++) {
        FILE *file = fopen(names[i], "rb");
        if (!file || fseek(file, 0, SEEK_END) < 0) {
            perror(names[i]);
            return 2;
        }
        size_t size = (size_t)ftell(file);
        rewind(file);
        uint8_t *data = exactly(size);
        if (fread(data, 1, size, file) != size) {
            perror(names[i]);
            return 2;
        }
        fclose(file);
        printf("%s\n", names[i]);
        fflush(stdout);
        LLVMFuzzerTestOneInput(data, size);
        free(data);
    }
    return 0;
}
