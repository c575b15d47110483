#define _GNU_SOURCE
#include "sim.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* NVML's handles are opaque; here each is a number that says what it names: kind, GPU minor, GPU and compute instance.
 * As with the real library, a handle kept past its instance's end may come to name a later instance. */
enum handle_kind { GPU_HANDLE = 1, MIG_HANDLE, GI_HANDLE, CI_HANDLE };
enum { HANDLE_MARK = 0x5D1 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static unsigned initialized; /* nvmlInit calls not yet undone; guarded by the mutex */

static void *handle(enum handle_kind kind, unsigned gpu, unsigned gi, unsigned ci)
{
    return (void *)((uintptr_t)HANDLE_MARK << 40 | (uintptr_t)kind << 36 | (uintptr_t)gpu << 24 | gi << 12 | ci);
}

void *gpu_handle(const struct gpu *gpu) { return handle(GPU_HANDLE, gpu->minor, 0, 0); }
void *mig_handle(const struct ci *ci) { return handle(MIG_HANDLE, ci->gpu, ci->gi, ci->id); }
void *gi_handle(const struct gi *gi) { return handle(GI_HANDLE, gi->gpu, gi->id, 0); }
void *ci_handle(const struct ci *ci) { return handle(CI_HANDLE, ci->gpu, ci->gi, ci->id); }

static nvmlReturn_t resolve(struct session *s, const void *pointer, enum want want)
{
    uintptr_t value = (uintptr_t)pointer;
    enum handle_kind kind = value >> 36 & 0xF;
    unsigned gpu = value >> 24 & 0xFFF, gi = value >> 12 & 0xFFF, ci = value & 0xFFF;

    if (value >> 40 != HANDLE_MARK || !(s->gpu = find_gpu(s->state, gpu)))
        return NVML_ERROR_INVALID_ARGUMENT;
    bool device = kind == GPU_HANDLE || kind == MIG_HANDLE;
    if (device != (want <= MIG_DEVICE) || (want == GPU_INSTANCE && kind != GI_HANDLE) ||
        (want == COMPUTE_INSTANCE && kind != CI_HANDLE))
        return NVML_ERROR_INVALID_ARGUMENT;
    if (s->gpu->lost)
        return NVML_ERROR_GPU_IS_LOST;
    if ((want == WHOLE_GPU && kind == MIG_HANDLE) || (want == MIG_DEVICE && kind == GPU_HANDLE))
        return NVML_ERROR_NOT_SUPPORTED;
    if (kind == GPU_HANDLE)
        return NVML_SUCCESS;
    if (!(s->gi = find_gi(s->state, gpu, gi)))
        return NVML_ERROR_NOT_FOUND;
    if (kind != GI_HANDLE && !(s->ci = find_ci(s->state, gpu, gi, ci)))
        return NVML_ERROR_NOT_FOUND;
    return NVML_SUCCESS;
}

/* The machine as it is now, or as it is when such calls return again: the mutex is held meanwhile, so that another
 * thread's call hangs as well. Unlike in a real driver's worst case, a signal still ends the process. */
static nvmlReturn_t refresh(struct session *s, enum hang kind)
{
    nvmlReturn_t result;
    while (!(result = state_refresh(&s->state)) && s->state->driver.hangs == kind)
        nanosleep(&(struct timespec){.tv_nsec = 20 * 1000000L}, NULL);
    return result;
}

nvmlReturn_t session_open(struct session *s)
{
    pthread_mutex_lock(&mutex);
    s->entered = true;
    REQUIRE(initialized, NVML_ERROR_UNINITIALIZED);
    nvmlReturn_t result = refresh(s, CALLS_HANG);
    return result ? result : s->state->driver.loaded ? NVML_SUCCESS : NVML_ERROR_DRIVER_NOT_LOADED;
}

nvmlReturn_t session_enter(struct session *s, const void *pointer, enum want want)
{
    nvmlReturn_t result = session_open(s);
    return result ? result : resolve(s, pointer, want);
}

bool permitted(const struct state *state)
{
    return state->driver.permit_any || geteuid() == 0;
}

static void slow_down(const struct driver *driver)
{
    nanosleep(&(struct timespec){driver->slow_ms / 1000, driver->slow_ms % 1000 * 1000000L}, NULL);
}

nvmlReturn_t session_change(struct session *s, const void *pointer, enum want want)
{
    nvmlReturn_t result = session_enter(s, pointer, want);
    REQUIRE(!result, result);
    REQUIRE(permitted(s->state), NVML_ERROR_NO_PERMISSION);
    result = refresh(s, CHANGES_HANG);
    REQUIRE(!result, result);
    slow_down(&s->state->driver);
    result = state_lock(&s->lock);
    REQUIRE(!result, result);
    result = state_refresh(&s->state);
    return result ? result : resolve(s, pointer, want);
}

void session_leave(struct session *s)
{
    state_unlock(&s->lock);
    if (s->entered)
        pthread_mutex_unlock(&mutex);
}

struct ci *mig_at(struct session *s, unsigned index)
{
    unsigned devices = 0, at = 0, limit = gpu_model(s->gpu)->max_mig_devices;
    for (unsigned i = 0; i < s->state->ci_count; i++)
        devices += s->state->cis[i].gpu == s->gpu->minor;
    for (unsigned i = 0; i < s->state->ci_count; i++) {
        if (s->state->cis[i].gpu != s->gpu->minor)
            continue;
        while (at < 32 && s->gpu->holes >> at & 1 && at + devices < limit)
            at++;
        if (at == index)
            return &s->state->cis[i];
        at++;
        devices--;
    }
    return NULL;
}

static bool within(unsigned have, unsigned wanted)
{
    return wanted == NO_INSTANCE || have == wanted;
}

bool in_use(const struct state *state, const struct gpu *gpu, unsigned gi, unsigned ci)
{
    if (gi == NO_INSTANCE && gpu->busy)
        return true;
    for (const struct gi *it = state->gis; it < state->gis + state->gi_count; it++)
        if (it->gpu == gpu->minor && it->busy && within(it->id, gi) && ci == NO_INSTANCE)
            return true;
    for (const struct ci *it = state->cis; it < state->cis + state->ci_count; it++)
        if (it->gpu == gpu->minor && it->busy && within(it->gi, gi) && within(it->id, ci))
            return true;
    for (const struct process *it = state->processes; it < state->processes + state->process_count; it++)
        if (it->gpu == gpu->minor && within(it->gi, gi) && within(it->ci, ci))
            return true;
    return false;
}

uint64_t memory_used_mib(const struct state *state, const struct gpu *gpu, unsigned gi, unsigned ci)
{
    uint64_t used = 0;
    for (const struct process *it = state->processes; it < state->processes + state->process_count; it++)
        if (it->gpu == gpu->minor && within(it->gi, gi) && within(it->ci, ci))
            used += it->mib;
    return used;
}

nvmlReturn_t copy_text(char *out, unsigned length, const char *text)
{
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(strlen(text) < length, NVML_ERROR_INSUFFICIENT_SIZE);
    strcpy(out, text);
    return NVML_SUCCESS;
}

NVML_API nvmlInitWithFlags(unsigned int flags)
{
    (void)flags;
    SESSION(s);
    pthread_mutex_lock(&mutex);
    s.entered = true;
    nvmlReturn_t result = refresh(&s, INIT_HANGS);
    REQUIRE(!result, result);
    slow_down(&s.state->driver);
    REQUIRE(s.state->driver.loaded, NVML_ERROR_DRIVER_NOT_LOADED);
    REQUIRE(!s.state->driver.mismatch, NVML_ERROR_LIB_RM_VERSION_MISMATCH);
    initialized++;
    return NVML_SUCCESS;
}

NVML_API nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

NVML_API nvmlShutdown(void)
{
    SESSION(s);
    pthread_mutex_lock(&mutex);
    s.entered = true;
    REQUIRE(initialized, NVML_ERROR_UNINITIALIZED);
    initialized--;
    return NVML_SUCCESS;
}
