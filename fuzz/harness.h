/*
 * What all harnesses share. An input is a run of records of 16 bytes, so that a mutation of one
 * leaves the others what they were; the mutator below moves whole ones about, too.
 */

#ifndef FUZZ_HARNESS_H
#define FUZZ_HARNESS_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RECORD = 16 };

struct record {
    uint8_t op, a;
    uint16_t b;
    uint32_t c;
    uint64_t d;
};

_Static_assert(sizeof(struct record) == RECORD, "a record has no holes");

/* An oracle: what must hold whatever the input is. */
#define REQUIRE(condition)                                                                         \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);         \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct input {
    const uint8_t *data;
    size_t size;
};

/* A record of zeros when the input is at its end. */
static inline struct record next_record(struct input *input) {
    struct record record = {0};
    size_t size = input->size < RECORD ? input->size : RECORD;
    if (size) /* memcpy may not be called with NULL, which an empty input is */
        memcpy(&record, input->data, size);
    input->data += size;
    input->size -= size;
    return record;
}

/* Memory of exactly this size: an access behind its end is an error at once. */
static inline void *exactly(size_t size) {
    void *memory = calloc(1, size);
    REQUIRE(memory);
    return memory;
}

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed);

/* Only libFuzzer has a LLVMFuzzerMutate, and only a harness that it drives is mutated. */
#ifdef FUZZ_MUTATOR
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed) {
    size_t count = size / RECORD, from, to;
    if (!count || seed % 8 == 0)
        return LLVMFuzzerMutate(data, size, max_size);
    from = (seed >> 8) % count;
    to = (seed >> 16) % count;
    if (seed % 8 == 1 && (count + 1) * RECORD <= max_size) { /* a copy of one goes elsewhere */
        uint8_t copied[RECORD];
        memcpy(copied, data + from * RECORD, RECORD);
        memmove(data + (to + 1) * RECORD, data + to * RECORD, (count - to) * RECORD);
        memcpy(data + to * RECORD, copied, RECORD);
        return (count + 1) * RECORD;
    }
    if (seed % 8 == 2 && count > 1) { /* one goes */
        memmove(data + from * RECORD, data + (from + 1) * RECORD, (count - from - 1) * RECORD);
        return (count - 1) * RECORD;
    }
    if (seed % 8 == 3) { /* one becomes another kind of step */
        data[from * RECORD] = (uint8_t)(seed >> 24);
        return count * RECORD;
    }
    /* One is mutated in place, as a thing of its own size. */
    size_t length = LLVMFuzzerMutate(data + from * RECORD, RECORD, RECORD);
    memset(data + from * RECORD + length, 0, RECORD - length);
    return count * RECORD;
}
#endif

#endif
