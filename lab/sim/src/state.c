#define _GNU_SOURCE
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

enum { STATE_FILE_MAX = 256 * 1024 };

struct field {
    const char *key;
    enum { NUMBER, LONG_NUMBER, TEXT } type;
    size_t offset, size;
};

/* One kind of line: its first word, and the `key=value` pairs that follow. This table reads and writes the file. */
struct kind {
    const char *name;
    const struct field *fields;
    size_t records, stride, count, capacity; /* count: offset of the counter, 0 for the one `driver` line */
};

#define N(type, key) {#key, NUMBER, offsetof(struct type, key), sizeof(unsigned)}
#define L(type, key) {#key, LONG_NUMBER, offsetof(struct type, key), sizeof(uint64_t)}
#define T(type, key) {#key, TEXT, offsetof(struct type, key), sizeof(((struct type *)0)->key)}
#define END {0}

static const struct field driver_fields[] = {
    T(driver, version), N(driver, loaded), N(driver, mismatch), N(driver, permit_any), N(driver, boot),
    N(driver, slow_ms), N(driver, hangs),  L(driver, seed),     L(driver, next),       END,
};
static const struct field gpu_fields[] = {
    N(gpu, minor),         N(gpu, mig),         N(gpu, pending),
    T(gpu, model),         T(gpu, uuid),        T(gpu, pci),
    T(gpu, serial),        N(gpu, passthrough), N(gpu, persistence),
    N(gpu, lost),          N(gpu, busy),        N(gpu, holes),
    N(gpu, utilization),   N(gpu, temperature), N(gpu, remap_corrected),
    N(gpu, remap_uncorrected), N(gpu, remap_pending), N(gpu, remap_failed),
    N(gpu, retired),       N(gpu, retired_pending), N(gpu, ecc_corrected),
    N(gpu, ecc_uncorrected), END,
};
static const struct field gi_fields[] = {N(gi, gpu), N(gi, id), N(gi, profile), N(gi, start), N(gi, busy), END};
static const struct field ci_fields[] = {
    N(ci, gpu), N(ci, gi), N(ci, id), N(ci, profile), N(ci, start), N(ci, busy), T(ci, uuid), END,
};
static const struct field process_fields[] = {
    N(process, gpu), N(process, gi), N(process, ci), N(process, pid), N(process, mib), T(process, type), END,
};
static const struct field xid_fields[] = {N(xid, gpu), N(xid, code), L(xid, number), END};

#define RECORDS(type, plural, max) \
    {#type, type##_fields, offsetof(struct state, plural), sizeof(struct type), offsetof(struct state, type##_count), max}

static const struct kind kinds[] = {
    {"driver", driver_fields, offsetof(struct state, driver), sizeof(struct driver), 0, 1},
    RECORDS(gpu, gpus, MAX_GPUS),
    RECORDS(gi, gis, MAX_GIS),
    RECORDS(ci, cis, MAX_CIS),
    RECORDS(process, processes, MAX_PROCESSES),
    RECORDS(xid, xids, MAX_XIDS),
};
enum { KINDS = sizeof(kinds) / sizeof(*kinds) };

static const char *state_path(void)
{
    const char *path = secure_getenv("NVML_SIM_STATE");
    return path && *path ? path : "/var/lib/nvml-sim/state";
}

static bool set_field(const struct field *field, char *record, const char *text)
{
    if (field->type == TEXT) {
        if (strlen(text) >= field->size)
            return false;
        strcpy(record + field->offset, text);
        return true;
    }
    char *end;
    errno = 0;
    unsigned long long number = strcmp(text, "-") ? strtoull(text, &end, 10) : NO_INSTANCE;
    if (errno || (strcmp(text, "-") && (end == text || *end)))
        return false;
    if (field->type == LONG_NUMBER) {
        memcpy(record + field->offset, &(uint64_t){number}, sizeof(uint64_t));
        return true;
    }
    memcpy(record + field->offset, &(unsigned){(unsigned)number}, sizeof(unsigned));
    return number <= UINT_MAX;
}

static bool read_line(struct state *state, char *line)
{
    char *rest, *word = strtok_r(line, " \t", &rest);
    if (!word || *word == '#')
        return true;
    for (const struct kind *kind = kinds; kind < kinds + KINDS; kind++) {
        if (strcmp(kind->name, word))
            continue;
        unsigned *count = kind->count ? (unsigned *)((char *)state + kind->count) : &(unsigned){0};
        if (*count >= kind->capacity)
            return false;
        char *record = (char *)state + kind->records + *count * kind->stride;
        while ((word = strtok_r(NULL, " \t", &rest))) {
            char *value = strchr(word, '=');
            if (!value)
                return false;
            *value++ = '\0';
            const struct field *field = kind->fields;
            while (field->key && strcmp(field->key, word))
                field++;
            if (!field->key || !set_field(field, record, value))
                return false;
        }
        ++*count;
        return true;
    }
    return false;
}

static bool read_text(struct state *state, char *text)
{
    memset(state, 0, sizeof(*state));
    for (char *rest, *line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
        if (!read_line(state, line))
            return false;
    for (unsigned i = 0; i < state->gpu_count; i++)
        if (!gpu_model(&state->gpus[i]))
            return false;
    return true;
}

/* The file last read stays open: its inode cannot be given to a later one, so equal inodes mean the same file.
 * Size and time catch an edit in place, by hand. */
static struct state machine;
static int open_file = -1;
static struct stat seen;

static void forget(void)
{
    if (open_file >= 0)
        close(open_file);
    open_file = -1;
}

nvmlReturn_t state_refresh(struct state **state)
{
    struct stat now;

    *state = &machine;
    if (stat(state_path(), &now))
        return NVML_ERROR_DRIVER_NOT_LOADED;
    if (open_file >= 0 && now.st_ino == seen.st_ino && now.st_dev == seen.st_dev && now.st_size == seen.st_size &&
        now.st_mtim.tv_sec == seen.st_mtim.tv_sec && now.st_mtim.tv_nsec == seen.st_mtim.tv_nsec)
        return NVML_SUCCESS;

    int file = open(state_path(), O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return errno == EACCES ? NVML_ERROR_NO_PERMISSION : NVML_ERROR_DRIVER_NOT_LOADED;
    static char text[STATE_FILE_MAX];
    ssize_t length = 0, part = 1;
    while (part > 0 && length < STATE_FILE_MAX - 1) {
        part = read(file, text + length, (size_t)(STATE_FILE_MAX - 1 - length));
        length += part > 0 ? part : 0;
    }
    text[length] = '\0';
    bool good = part == 0 && !fstat(file, &now) && read_text(&machine, text);
    forget();
    open_file = file;
    seen = now;
    if (!good)
        forget();
    return good ? NVML_SUCCESS : NVML_ERROR_UNKNOWN;
}

/* A file beside the state, because the state file itself is a new one after each change. */
nvmlReturn_t state_lock(int *lock)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s.lock", state_path());
    *lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (*lock < 0)
        return NVML_ERROR_NO_PERMISSION;
    while (flock(*lock, LOCK_EX))
        if (errno != EINTR)
            return NVML_ERROR_UNKNOWN;
    return NVML_SUCCESS;
}

void state_unlock(int *lock)
{
    if (*lock >= 0)
        close(*lock);
    *lock = -1;
}

static void write_record(FILE *out, const struct kind *kind, const char *record)
{
    fputs(kind->name, out);
    for (const struct field *field = kind->fields; field->key; field++) {
        unsigned number;
        uint64_t long_number;
        memcpy(&number, record + field->offset, sizeof number);
        if (field->type == TEXT)
            fprintf(out, " %s=%s", field->key, record + field->offset);
        else if (field->type == LONG_NUMBER)
            fprintf(out, " %s=%llu", field->key,
                    (unsigned long long)*(uint64_t *)memcpy(&long_number, record + field->offset, sizeof long_number));
        else if (number == NO_INSTANCE)
            fprintf(out, " %s=-", field->key);
        else
            fprintf(out, " %s=%u", field->key, number);
    }
    fputc('\n', out);
}

nvmlReturn_t state_write(const struct state *state)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s.new", state_path()); /* one writer at a time: the lock is held */
    FILE *out = fopen(path, "we");
    if (!out)
        return NVML_ERROR_NO_PERMISSION;
    for (const struct kind *kind = kinds; kind < kinds + KINDS; kind++) {
        unsigned count = kind->count ? *(const unsigned *)((const char *)state + kind->count) : 1;
        for (unsigned i = 0; i < count; i++)
            write_record(out, kind, (const char *)state + kind->records + i * kind->stride);
    }
    bool good = !ferror(out) && !fchmod(fileno(out), 0644);
    good = !fclose(out) && good;
    forget(); /* also when this failed: what is in memory then differs from the file */
    return good && !rename(path, state_path()) ? NVML_SUCCESS : NVML_ERROR_UNKNOWN;
}

const struct model *gpu_model(const struct gpu *gpu)
{
    return model_named(gpu->model);
}

struct gpu *find_gpu(struct state *state, unsigned minor)
{
    for (struct gpu *gpu = state->gpus; gpu < state->gpus + state->gpu_count; gpu++)
        if (gpu->minor == minor)
            return gpu;
    return NULL;
}

struct gi *find_gi(struct state *state, unsigned gpu, unsigned id)
{
    for (struct gi *gi = state->gis; gi < state->gis + state->gi_count; gi++)
        if (gi->gpu == gpu && gi->id == id)
            return gi;
    return NULL;
}

struct ci *find_ci(struct state *state, unsigned gpu, unsigned gi, unsigned id)
{
    for (struct ci *ci = state->cis; ci < state->cis + state->ci_count; ci++)
        if (ci->gpu == gpu && ci->gi == gi && ci->id == id)
            return ci;
    return NULL;
}

