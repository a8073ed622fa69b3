/* Part of agent.c: byte queues, and the words and base64 of a line. */
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <unistd.h>

static _Noreturn void die(const char *what) {
    fprintf(stderr, "ninepd guest agent: %s: %s\n", what, strerror(errno));
    sync();
    reboot(RB_AUTOBOOT);
    _exit(1);
}

/* A byte queue: append at the end, take from the front. */
struct queue {
    char *data;
    size_t start, end, size;
};

static char *queue_room(struct queue *q, size_t bytes) {
    if (q->start && q->end + bytes > q->size) {
        memmove(q->data, q->data + q->start, q->end - q->start);
        q->end -= q->start;
        q->start = 0;
    }
    if (q->end + bytes > q->size) {
        q->size = q->end + bytes + q->size / 2;
        q->data = realloc(q->data, q->size);
        if (!q->data)
            die("out of memory");
    }
    return q->data + q->end;
}

static void queue_put(struct queue *q, const void *data, size_t bytes) {
    memcpy(queue_room(q, bytes), data, bytes);
    q->end += bytes;
}

static void queue_text(struct queue *q, const char *text) { queue_put(q, text, strlen(text)); }

static size_t queued(const struct queue *q) { return q->end - q->start; }

/* False when the other side is gone. */
static bool queue_write(struct queue *q, int fd) {
    while (queued(q)) {
        ssize_t n = write(fd, q->data + q->start, queued(q));

        if (n < 0)
            return errno == EAGAIN || errno == EINTR;
        q->start += (size_t)n;
    }
    q->start = q->end = 0;
    return true;
}

/* Bytes read, 0 at the end, -1 when there is nothing now. */
static ssize_t queue_read(struct queue *q, int fd, size_t bytes) {
    ssize_t n = read(fd, queue_room(q, bytes), bytes);

    if (n > 0)
        q->end += (size_t)n;
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? -1 : 0;
    return n;
}

/* The next line without its end, or NULL; valid until the queue is next used. */
static char *queue_line(struct queue *q) {
    char *line = q->data + q->start;
    char *end = queued(q) ? memchr(line, '\n', queued(q)) : NULL;

    if (!end)
        return NULL;
    *end = '\0';
    q->start = (size_t)(end + 1 - q->data);
    return line;
}

static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

static void queue_base64(struct queue *q, const uint8_t *data, size_t bytes) {
    char *to = queue_room(q, (bytes + 2) / 3 * 4);

    for (size_t i = 0; i < bytes; i += 3) {
        size_t left = bytes - i;
        uint32_t v = (uint32_t)data[i] << 16;

        if (left > 1)
            v |= (uint32_t)data[i + 1] << 8;
        if (left > 2)
            v |= data[i + 2];
        *to++ = digits[v >> 18];
        *to++ = digits[v >> 12 & 63];
        *to++ = left > 1 ? digits[v >> 6 & 63] : '=';
        *to++ = left > 2 ? digits[v & 63] : '=';
    }
    q->end += (bytes + 2) / 3 * 4;
}

/* Decodes in place; the result is never longer. Returns its length. */
static size_t decode(char *text) {
    static int8_t value[256];
    uint8_t *to = (uint8_t *)text;
    uint32_t bits = 0;
    int have = 0;

    if (!value['B'])
        for (int i = 0; i < 64; i++)
            value[(uint8_t)digits[i]] = (int8_t)i;
    for (const char *p = text; *p && *p != '='; p++) {
        bits = bits << 6 | (uint32_t)value[(uint8_t)*p];
        have += 6;
        if (have >= 8) {
            have -= 8;
            *to++ = (uint8_t)(bits >> have);
        }
    }
    return (size_t)(to - (uint8_t *)text);
}

static char *word(char **rest) {
    static char none[1];
    char *w = strsep(rest, " ");

    return w ? w : none;
}

static long number(char **rest) { return strtol(word(rest), NULL, 0); }
