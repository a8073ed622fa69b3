/*
 * Guest memory that changes under the device's eyes. Included before ninepd's sources, into which
 * it puts a hook wherever they have read guest memory: the next of the changes that the input asks
 * for may happen there.
 *
 * Each region is a block of its own, exactly as large, so that AddressSanitizer guards its ends. A
 * second copy of it, the shadow, has all that the guest has written: what differs was written by
 * the device.
 */

#ifndef FUZZ_GUEST_H
#define FUZZ_GUEST_H

#include <stdatomic.h>
#include <stdbool.h>

#include "harness.h"

enum { REGIONS = 3, MEDDLINGS = 8 };

struct guest_region {
    uint64_t gpa, ua, size;
    uint8_t *bytes, *shadow; /* NULL while it is not shared */
};

static struct guest {
    struct guest_region regions[REGIONS];
    struct meddling {
        uint32_t delay; /* 0: none */
        uint8_t size;
        uint64_t gpa, value;
    } meddlings[MEDDLINGS];
} guest;

/* Eight of a step's bytes name a place in guest memory, often one that exists. */
static uint64_t guest_address(uint64_t number) {
    if (number >> 63)
        return number;
    return guest.regions[(number >> 32) % REGIONS].gpa + (number & 0x1ffff);
}

static struct guest_region *guest_region_at(uint64_t gpa) {
    for (int i = 0; i < REGIONS; i++) {
        struct guest_region *region = &guest.regions[i];
        if (region->bytes && gpa - region->gpa < region->size)
            return region;
    }
    return NULL;
}

/* The guest writes; what is not its memory is left out. */
static void guest_write(uint64_t gpa, const void *data, size_t size) {
    struct guest_region *region = guest_region_at(gpa);
    if (!region)
        return;
    uint64_t at = gpa - region->gpa;
    if (size > region->size - at)
        size = region->size - at;
    memcpy(region->bytes + at, data, size);
    memcpy(region->shadow + at, data, size);
}

static void guest_share(struct guest_region *region) {
    region->bytes = exactly(region->size);
    region->shadow = exactly(region->size);
}

static void guest_unshare(struct guest_region *region) {
    free(region->bytes);
    free(region->shadow);
    region->bytes = region->shadow = NULL;
}

/* The device has just read something. */
static void guest_meddle(void) {
    for (int i = 0; i < MEDDLINGS; i++) {
        struct meddling *m = &guest.meddlings[i];
        if (m->delay && --m->delay == 0)
            guest_write(m->gpa, &m->value, m->size);
    }
}

/* Behind every copy out of guest memory there is this fence (copy_in in _chains.c)... */
#undef atomic_signal_fence
#define atomic_signal_fence(order) guest_meddle()

/* ...and all else is read by atomics. */
#undef atomic_load_explicit
#ifdef __clang__
#define atomic_load_explicit(at, order) (guest_meddle(), __c11_atomic_load(at, order))
#else
#define atomic_load_explicit(at, order)                                                            \
    __extension__({                                                                                \
        __auto_type from = (at);                                                                   \
        __typeof__((void)0, *from) value;                                                          \
        guest_meddle();                                                                            \
        __atomic_load(from, &value, (order));                                                      \
        value;                                                                                     \
    })
#endif

/* Files: what is moved is touched byte by byte, so that AddressSanitizer sees it, and the outcome
 * is the input's to choose. */
#include <errno.h>
#include <sys/uio.h>

enum { GUEST_FILE = 1 << 20 }; /* no descriptor is so large */

static uint32_t guest_file_outcome; /* 0: all; an errno; above, so many bytes less 256 */

static ssize_t guest_move(const struct iovec *pieces, int count, bool in) {
    size_t wanted = 0, limit, done = 0;
    for (int i = 0; i < count; i++)
        wanted += pieces[i].iov_len;
    limit = guest_file_outcome >= 256 ? (guest_file_outcome - 256) % (wanted + 1) : wanted;
    for (int i = 0; i < count && done < limit; i++) {
        size_t n = pieces[i].iov_len < limit - done ? pieces[i].iov_len : limit - done;
        for (size_t at = 0; at < n; at++) {
            volatile uint8_t *byte = (uint8_t *)pieces[i].iov_base + at;
            if (in)
                *byte = 0xa5;
            else
                (void)*byte;
        }
        done += n;
    }
    if (guest_file_outcome && guest_file_outcome < 256) {
        errno = (int)guest_file_outcome;
        return -1;
    }
    return (ssize_t)done;
}

static ssize_t guest_preadv2(int fd, const struct iovec *pieces, int count, off_t at, int flags) {
    return fd == GUEST_FILE ? guest_move(pieces, count, true)
                            : preadv2(fd, pieces, count, at, flags);
}

static ssize_t guest_pwritev2(int fd, const struct iovec *pieces, int count, off_t at, int flags) {
    return fd == GUEST_FILE ? guest_move(pieces, count, false)
                            : pwritev2(fd, pieces, count, at, flags);
}

#define preadv2 guest_preadv2
#define pwritev2 guest_pwritev2

#endif
