/*
 * Users and groups whose numbers on the host are not those that the guest knows. What has no number
 * over there shows as the kernel shows it, and is refused by the caller on the way to the host.
 */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/stat.h>

/* cdef-begin */
typedef struct {
    uint32_t guest, host, count;
} nd_id_range;

/* Of users, or of groups. Without ranges an id is the same on both sides; but what is in no range
 * is `squash` on the host, unless that is all ones. */
typedef struct {
    uint32_t squash, count;
    nd_id_range ranges[];
} nd_id_map;

uint32_t nd_id_to_guest(const nd_id_map *map, uint32_t id);
uint32_t nd_id_to_host(const nd_id_map *map, uint32_t id);
void nd_show_ids(uint8_t *body, const nd_id_map *uids, const nd_id_map *gids);

#define ND_KNOWN 8

int nd_rights_to(int dirfd, const char *name, const nd_id_map *uids, const nd_id_map *gids);
/* cdef-end */

/* The guest's number of an id of the host's; all ones if it has none. */
uint32_t nd_id_to_guest(const nd_id_map *map, uint32_t id) {
    for (uint32_t i = 0; i < map->count; i++) {
        const nd_id_range *range = &map->ranges[i];
        if (id - range->host < range->count)
            return range->guest + (id - range->host);
    }
    return map->count ? UINT32_MAX : id;
}

/* The host's number of an id of the guest's; all ones if it has none. */
uint32_t nd_id_to_host(const nd_id_map *map, uint32_t id) {
    for (uint32_t i = 0; i < map->count; i++) {
        const nd_id_range *range = &map->ranges[i];
        if (id - range->guest < range->count)
            return range->host + (id - range->guest);
    }
    return map->count || map->squash != UINT32_MAX ? map->squash : id;
}

static void show_id(uint8_t *at, const nd_id_map *map) {
    const uint32_t overflow = 65534; /* DEFAULT_OVERFLOWUID (include/linux/highuid.h) */
    uint32_t id;
    memcpy(&id, at, sizeof id);
    id = nd_id_to_guest(map, le32toh(id));
    put32(at, id == UINT32_MAX ? overflow : id);
}

/* Put the guest's ids into the body of an Rgetattr that shows the host's. */
void nd_show_ids(uint8_t *body, const nd_id_map *uids, const nd_id_map *gids) {
    show_id(body + ND_BODY_UID, uids);
    show_id(body + ND_BODY_GID, gids);
}

/* What the guest's root may do with a name in a directory, or with `dirfd` itself if `name` is
 * empty. If both owners have numbers in the guest that is everything, and ND_KNOWN; else what the
 * mode says, for capabilities do not reach there (Linux, privileged_wrt_inode_uidgid()). */
int nd_rights_to(int dirfd, const char *name, const nd_id_map *uids, const nd_id_map *gids) {
    struct stat st;
    if (fstatat(dirfd, name, &st, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT) < 0)
        return -errno;
    uint32_t uid = nd_id_to_guest(uids, st.st_uid), gid = nd_id_to_guest(gids, st.st_gid);
    if (uid != UINT32_MAX && gid != UINT32_MAX)
        return ND_KNOWN | S_IRWXO;
    int shift = uid == 0 ? 6 : gid == 0 ? 3 : 0;
    return (int)(st.st_mode >> shift & S_IRWXO);
}
