/*
 * What a device counts, for whoever watches it: another process maps it, and reads it without
 * asking. So each number is stored whole, and only grows or is a gauge; nothing here is ever read
 * back to decide something.
 *
 * Two threads may count at once, when one front end follows another. Additions are atomic, because
 * a total that seems to fall is taken for one that has begun anew.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdint.h>
#include <time.h>

/* cdef-begin */
/* Kinds of messages: half the number of a T-message; 0 is what else comes. Errors are counted by
 * errno; 0 is one that tells none, or is unknown. The last bucket is for what took longer than the
 * bound of the one before. */
enum { NP_STATS_KINDS = 64, NP_STATS_ERRORS = 136, NP_STATS_BUCKETS = 29 };

/* Of messages of one kind that were answered. Times are from when a request was taken from the ring
 * to when its reply was put there. */
typedef struct {
    uint64_t requests, bytes_in, bytes_out, ns;
    uint64_t buckets[NP_STATS_BUCKETS]; /* up to 1024 ns, and each twice that of the one before */
    uint64_t errors[NP_STATS_ERRORS];
} np_message_stats;

/* in_flight and the last six are gauges. All behind in_flight is counted in Python. */
typedef struct {
    uint64_t taken, batches, kicks, spin_hits, sleeps, calls, calls_saved, dropped, in_flight;
    uint64_t reclaims, stalls, hand_overs, front_ends, restarts;
    uint64_t fids, files, descriptors, reclaimed, connected, pid;
    np_message_stats messages[NP_STATS_KINDS];
} np_stats;
/* cdef-end */

#define LEAST_NS 1024
#define ERROR_AT 7 /* of an Rlerror: behind size[4] type[1] tag[2] */

enum { RLERROR = 7, RERROR = 107 };

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void bump(uint64_t *total, uint64_t more) {
    __atomic_fetch_add(total, more, __ATOMIC_RELAXED);
}

static void gauge(uint64_t *value, uint64_t now) { __atomic_store_n(value, now, __ATOMIC_RELAXED); }

static uint32_t little(const uint8_t *from, int bytes) {
    uint32_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint32_t)from[i] << (8 * i);
    return value;
}

/* The errno that a reply tells. An Rerror has it behind its words, in 9P2000.u; in 9P2000 there are
 * words only. */
static uint32_t told_error(const uint8_t *reply, uint32_t len) {
    uint32_t at = ERROR_AT;
    if (reply[4] == RERROR && len >= at + 2)
        at += 2 + little(reply + at, 2);
    uint32_t error = len >= 4 && at <= len - 4 ? little(reply + at, 4) : 0;
    return error < NP_STATS_ERRORS ? error : 0;
}

static uint32_t bucket_of(uint64_t ns) {
    uint32_t at = 0;
    for (uint64_t bound = LEAST_NS; ns > bound && at < NP_STATS_BUCKETS - 1; bound *= 2)
        at++;
    return at;
}

/* A request was answered by `reply`, of which `len` bytes are at hand. */
static void count_reply(np_stats *stats, uint8_t type, uint64_t ns, uint64_t in, uint64_t out,
                        const uint8_t *reply, uint32_t len) {
    bool known = !(type & 1) && type / 2 < NP_STATS_KINDS;
    np_message_stats *message = &stats->messages[known ? type / 2 : 0];
    bump(&message->requests, 1);
    bump(&message->bytes_in, in);
    bump(&message->bytes_out, out);
    bump(&message->ns, ns);
    bump(&message->buckets[bucket_of(ns)], 1);
    if (reply[4] == RLERROR || reply[4] == RERROR)
        bump(&message->errors[told_error(reply, len)], 1);
}
