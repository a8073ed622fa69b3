/*
 * Waiting for requests: spinning, sleeping, and what the driver is told of it. Comes behind
 * _requests.c.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* cdef-begin */
static int np_vring_wait(np_vring *v, uint32_t spin_us_max);
static void np_vring_wake(np_vring *v);
static void np_vring_set_alarm(np_vring *v, uint64_t at_ns);
/* cdef-end */

#define IDLE_KICKS_MAX 64
#define YIELDED_NS 2000 /* a sched_yield() that took so long has let somebody else run */
#define CROWDED_MAX 4

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield" ::: "memory");
#endif
}

static bool something(np_vring *v) {
    return available(v) || atomic_load_explicit(&v->woken, memory_order_relaxed) ||
           atomic_load_explicit(&v->chains.memory->lost, memory_order_relaxed);
}

/* While we work, kicks are unwanted: with EVENT_IDX a stale avail_event sees to that. */
static void allow_kicks(np_vring *v, bool allow) {
    if (v->config.event_idx && !allow)
        return;
    uint32_t at = v->config.event_idx ? RING + 4 * v->config.num : FLAGS;
    uint16_t value = v->config.event_idx ? v->counters->last_avail : allow ? 0 : USED_NO_NOTIFY;
    store16(&v->used[at], value, memory_order_relaxed);
    mark_used(v, sizeof(value) * at, sizeof(value));
    announce_marks(v->chains.log);
}

/* Takes what poll() found readable. A kick may be a blocking eventfd that others read as well:
 * RWF_NOWAIT keeps us from hanging in it. The end of a file would be readable for ever. */
static int drain(np_vring *v, const char *what, int fd) {
    uint64_t value;
    struct iovec iov = {.iov_base = &value, .iov_len = sizeof(value)};
    ssize_t n = preadv2(fd, &iov, 1, -1, RWF_NOWAIT);
    if (n < 0 && errno == EOPNOTSUPP)
        n = read(fd, &value, sizeof(value));
    if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR)))
        return 0;
    return broken(&v->chains, "the %s descriptor fails: %s", what,
                  n ? strerror(errno) : "end of file");
}

/* An alarm that has passed is a wake. */
static void look_at_alarm(np_vring *v, uint64_t now) {
    if (v->alarm_ns && now >= v->alarm_ns)
        atomic_store(&v->woken, true);
}

/* poll(), but no longer than until the alarm. */
static int poll_until_alarm(np_vring *v, struct pollfd *fds, nfds_t count, int timeout_ms) {
    if (!v->alarm_ns)
        return poll(fds, count, timeout_ms);
    uint64_t now = now_ns(), left = v->alarm_ns > now ? v->alarm_ns - now : 0;
    if (timeout_ms >= 0)
        left = min(left, 1000000ull * (unsigned)timeout_ms);
    struct timespec timeout = {.tv_sec = (time_t)(left / 1000000000u),
                               .tv_nsec = (long)(left % 1000000000u)};
    int result = ppoll(fds, count, &timeout, NULL);
    look_at_alarm(v, now_ns());
    return result;
}

/* One sleep until the kick or the wake descriptor fires; 0, or -1 with the ring broken. */
static int doze(np_vring *v) {
    struct pollfd fds[2] = {{.fd = v->config.wake, .events = POLLIN},
                            {.fd = v->config.kick, .events = POLLIN}};
    /* Without a kick descriptor, or after many kicks for nothing: look every millisecond. */
    bool scan = v->config.kick < 0 || v->idle.kicks > IDLE_KICKS_MAX;
    bump(&v->stats->sleeps, 1);
    if (poll_until_alarm(v, fds, scan ? 1 : 2, scan ? 1 : -1) < 0)
        return errno == EINTR ? 0 : broken(&v->chains, "poll: %s", strerror(errno));
    if (fds[0].revents) {
        atomic_store(&v->woken, true);
        if (drain(v, "wake", v->config.wake) < 0)
            return -1;
    }
    if (scan) {
        v->idle.kicks = IDLE_KICKS_MAX;
    } else if (fds[1].revents) {
        bump(&v->stats->kicks, 1);
        v->idle.kicks++;
        return drain(v, "kick", v->config.kick);
    }
    return 0;
}

/* Asked now and then, because an administrator may change it. */
static bool confined(void) {
    cpu_set_t cpus;
    return sched_getaffinity(0, sizeof(cpus), &cpus) == 0 && CPU_COUNT(&cpus) == 1;
}

/*
 * Returns when there is something to look at. How long to spin first is learnt as KVM learns its
 * halt_poll_ns (virt/kvm/kvm_main.c, kvm_vcpu_halt): a gap that spinning would have caught opens
 * the window to twice that gap, one far longer halves it, so an idle ring soon does not spin. What
 * we measure holds our own wake-up, though: a slow one must not shut the window for ever, so every
 * 16th time it is tried again.
 *
 * Spinning is for a CPU of our own. On the only CPU that we may use, if others run whenever we
 * yield, it just makes the guest change processes more often: so we sleep and leave the window
 * shut.
 */
static int idle(np_vring *v, uint64_t max_ns) {
    uint64_t start = now_ns();
    uint64_t window_ns = min(v->idle.window_ns, max_ns);
    if (!window_ns && ++v->idle.shut % 16 == 0)
        window_ns = max_ns;
    bool yielded = false;
    for (uint64_t now = start; now - start < window_ns;) {
        for (int i = 0; i < 16; i++, relax())
            if (something(v)) {
                v->idle.window_ns = window_ns;
                v->idle.crowded = yielded ? v->idle.crowded + 1 : 0;
                bump(&v->stats->spin_hits, 1);
                return 0;
            }
        uint64_t before = now_ns();
        sched_yield(); /* who waits for this CPU may be the guest itself */
        now = now_ns();
        look_at_alarm(v, now);
        yielded |= now - before > YIELDED_NS;
        if (yielded && v->idle.crowded >= CROWDED_MAX) {
            if (confined())
                break;
            v->idle.crowded = 0;
        }
    }
    if (window_ns)
        v->idle.crowded = yielded ? v->idle.crowded + 1 : 0;
    int result = 0;
    allow_kicks(v, true);
    atomic_store(&v->asleep, true);
    /* Either the driver sees our wish for a kick, or we see its new index. */
    atomic_thread_fence(memory_order_seq_cst);
    while (result == 0 && !something(v))
        result = doze(v);
    atomic_store(&v->asleep, false);
    allow_kicks(v, false);
    v->idle.kicks = 0;
    uint64_t gap = now_ns() - start;
    if (v->idle.crowded > CROWDED_MAX)
        v->idle.window_ns = 0;
    else if (gap < max_ns)
        v->idle.window_ns = min(2 * gap, max_ns);
    else
        v->idle.window_ns = v->idle.window_ns > 2000 ? v->idle.window_ns / 2 : 0;
    return result;
}

/*
 * How many requests were taken into config.requests; 0 after a mere wake; -1: the ring is broken.
 * Whichever return comes next consumes a wake, so the caller looks for its cause after each.
 */
static int np_vring_wait(np_vring *v, uint32_t spin_us_max) {
    watch_rest(v->config.watch);
    if (v->chains.broken[0] || (!something(v) && idle(v, 1000ull * spin_us_max) < 0))
        return -1;
    watch_work(v->config.watch);
    if (atomic_load_explicit(&v->woken, memory_order_relaxed))
        atomic_exchange(&v->woken, false);
    return take_batch(v);
}

/* From any thread. A system call only if the device thread sleeps. */
static void np_vring_wake(np_vring *v) {
    atomic_store(&v->woken, true);
    if (atomic_load(&v->asleep))
        np_signal(v->config.wake);
}

/* For the thread that waits. */
static void np_vring_set_alarm(np_vring *v, uint64_t at_ns) { v->alarm_ns = at_ns; }
