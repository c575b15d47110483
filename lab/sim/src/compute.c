#define _GNU_SOURCE
#include "sim.h"

#include <stdio.h>
#include <string.h>

/* Compute instances divide a GPU instance's compute slices; their profiles are the same on all models, and here the
 * number a caller asks with and the id are one. */
static const unsigned slices_of[NVML_COMPUTE_INSTANCE_PROFILE_COUNT] = {1, 2, 3, 4, 7};

static const struct profile *parent(const struct model *model, const struct gi *gi)
{
    return profile_by_id(model, gi->profile);
}

/* The whole instance, or a part: one or two slices of any, three or four only of the full GPU. 0: no such part. */
unsigned ci_slices(const struct model *model, const struct gi *gi, unsigned profile)
{
    unsigned all = parent(model, gi)->slices;
    unsigned part = profile < NVML_COMPUTE_INSTANCE_PROFILE_COUNT ? slices_of[profile] : 0;
    return part == all || (part < all && (part <= 2 || all == 7)) ? part : 0;
}

/* Starts are multiples of the length, in the next power of two: 0, 2, 4 for two slices, 0 and 4 for three. */
static unsigned step(unsigned slices)
{
    return slices == 3 ? 4 : slices;
}

static unsigned taken_slices(const struct session *s)
{
    unsigned taken = 0;
    for (const struct ci *ci = s->state->cis; ci < s->state->cis + s->state->ci_count; ci++)
        if (ci->gpu == s->gi->gpu && ci->gi == s->gi->id)
            taken |= ((1u << ci_slices(gpu_model(s->gpu), s->gi, ci->profile)) - 1) << ci->start;
    return taken;
}

static unsigned count_places(const struct session *s, unsigned slices, unsigned taken)
{
    unsigned count = 0;
    for (unsigned at = 0; at + slices <= parent(gpu_model(s->gpu), s->gi)->slices; at += step(slices))
        count += !(taken & ((1u << slices) - 1) << at);
    return count;
}

static nvmlReturn_t profile_info(nvmlGpuInstance_t instance, unsigned profile, unsigned engines,
                                 nvmlComputeInstanceProfileInfo_v2_t *out)
{
    ENTER(instance, GPU_INSTANCE);
    REQUIRE(profile < NVML_COMPUTE_INSTANCE_PROFILE_COUNT && engines < NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_COUNT,
            NVML_ERROR_INVALID_ARGUMENT);
    const struct model *model = gpu_model(s.gpu);
    const struct profile *gi = parent(model, s.gi);
    unsigned slices = ci_slices(model, s.gi, profile);
    REQUIRE(slices, NVML_ERROR_NOT_SUPPORTED);
    bool whole = slices == gi->slices;
    *out = (nvmlComputeInstanceProfileInfo_v2_t){
        .version = out->version,
        .id = profile,
        .sliceCount = slices,
        .instanceCount = count_places(&s, slices, 0),
        .multiprocessorCount = whole ? gi->sm : slices * slice_multiprocessors(model),
        .sharedCopyEngineCount = gi->copy,
        .sharedDecoderCount = gi->decoders,
        .sharedEncoderCount = gi->encoders,
        .sharedJpegCount = gi->jpeg,
        .sharedOfaCount = gi->ofa,
    };
    if (whole)
        snprintf(out->name, sizeof out->name, "MIG %s", gi->name);
    else
        snprintf(out->name, sizeof out->name, "MIG %uc.%s", slices, gi->name);
    return NVML_SUCCESS;
}

NVML_API nvmlGpuInstanceGetComputeInstanceProfileInfo(nvmlGpuInstance_t instance, unsigned profile, unsigned engines,
                                                      nvmlComputeInstanceProfileInfo_t *out)
{
    nvmlComputeInstanceProfileInfo_v2_t full;
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    nvmlReturn_t result = profile_info(instance, profile, engines, &full);
    if (!result)
        *out = (nvmlComputeInstanceProfileInfo_t){
            full.id, full.sliceCount, full.instanceCount, full.multiprocessorCount, full.sharedCopyEngineCount,
            full.sharedDecoderCount, full.sharedEncoderCount, full.sharedJpegCount, full.sharedOfaCount};
    return result;
}

NVML_API nvmlGpuInstanceGetComputeInstanceProfileInfoV(nvmlGpuInstance_t instance, unsigned profile, unsigned engines,
                                                       nvmlComputeInstanceProfileInfo_v2_t *out)
{
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(out->version == NVML_STRUCT_VERSION(nvmlComputeInstanceProfileInfo_v2_t, 2),
            NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    return profile_info(instance, profile, engines, out);
}

NVML_API nvmlGpuInstanceGetComputeInstanceRemainingCapacity(nvmlGpuInstance_t instance, unsigned profile,
                                                            unsigned *count)
{
    ENTER(instance, GPU_INSTANCE);
    REQUIRE(count, NVML_ERROR_INVALID_ARGUMENT);
    unsigned slices = ci_slices(gpu_model(s.gpu), s.gi, profile);
    REQUIRE(slices, NVML_ERROR_NOT_SUPPORTED);
    *count = count_places(&s, slices, taken_slices(&s));
    return NVML_SUCCESS;
}

NVML_API nvmlGpuInstanceGetComputeInstancePossiblePlacements(nvmlGpuInstance_t instance, unsigned profile,
                                                             nvmlPlacement_t *out, unsigned *count)
{
    ENTER(instance, GPU_INSTANCE);
    REQUIRE(count, NVML_ERROR_INVALID_ARGUMENT);
    unsigned slices = ci_slices(gpu_model(s.gpu), s.gi, profile), room = *count;
    REQUIRE(slices, NVML_ERROR_NOT_SUPPORTED);
    *count = count_places(&s, slices, 0);
    REQUIRE(out, NVML_SUCCESS);
    REQUIRE(room >= *count, NVML_ERROR_INSUFFICIENT_SIZE);
    for (unsigned i = 0; i < *count; i++)
        out[i] = (nvmlPlacement_t){i * step(slices), slices};
    return NVML_SUCCESS;
}

static uint64_t scramble(uint64_t x)
{
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

/* A new instance never gets an old one's name, not even in the same place: its number goes into it. */
static void new_uuid(struct driver *driver, char *out, size_t length)
{
    uint64_t high = scramble(driver->seed ^ scramble(driver->next)), low = scramble(high ^ driver->seed);
    driver->next++;
    snprintf(out, length, "MIG-%08x-%04x-5%03x-%04x-%012llx", (unsigned)(high >> 32), (unsigned)(high >> 16 & 0xFFFF),
             (unsigned)(high & 0xFFF), (unsigned)(0x8000 | (low >> 48 & 0x3FFF)),
             (unsigned long long)(low & 0xFFFFFFFFFFFFu));
}

static struct ci *add_ci(struct state *state, const struct ci *new)
{
    unsigned at = state->ci_count++;
    for (; at; at--) {
        const struct ci *before = &state->cis[at - 1];
        if (before->gpu < new->gpu || (before->gpu == new->gpu && before->gi < new->gi) ||
            (before->gpu == new->gpu && before->gi == new->gi && before->id < new->id))
            break;
        state->cis[at] = *before;
    }
    state->cis[at] = *new;
    return &state->cis[at];
}

static nvmlReturn_t create(nvmlGpuInstance_t instance, unsigned profile, const nvmlPlacement_t *wanted,
                           nvmlComputeInstance_t *out)
{
    ENTER_TO_CHANGE(instance, GPU_INSTANCE);
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    unsigned slices = ci_slices(gpu_model(s.gpu), s.gi, profile), taken = taken_slices(&s);
    REQUIRE(slices, NVML_ERROR_NOT_SUPPORTED);
    REQUIRE(!wanted || (wanted->size == slices && wanted->start % step(slices) == 0), NVML_ERROR_INVALID_ARGUMENT);

    unsigned all = parent(gpu_model(s.gpu), s.gi)->slices, start = wanted ? wanted->start : 0;
    REQUIRE(start + slices <= all, NVML_ERROR_INVALID_ARGUMENT);
    while (!wanted && start + slices <= all && taken & ((1u << slices) - 1) << start)
        start += step(slices);
    REQUIRE(start + slices <= all && !(taken & ((1u << slices) - 1) << start), NVML_ERROR_INSUFFICIENT_RESOURCES);
    REQUIRE(s.state->ci_count < MAX_CIS, NVML_ERROR_INSUFFICIENT_RESOURCES);

    struct ci new = {.gpu = s.gi->gpu, .gi = s.gi->id, .profile = profile, .start = start};
    while (find_ci(s.state, new.gpu, new.gi, new.id))
        new.id++;
    new_uuid(&s.state->driver, new.uuid, sizeof new.uuid);
    *out = ci_handle(add_ci(s.state, &new));
    return state_write(s.state);
}

NVML_API nvmlGpuInstanceCreateComputeInstance(nvmlGpuInstance_t instance, unsigned profile, nvmlComputeInstance_t *out)
{
    return create(instance, profile, NULL, out);
}

NVML_API nvmlGpuInstanceCreateComputeInstanceWithPlacement(nvmlGpuInstance_t instance, unsigned profile,
                                                           const nvmlPlacement_t *placement, nvmlComputeInstance_t *out)
{
    REQUIRE(placement, NVML_ERROR_INVALID_ARGUMENT);
    return create(instance, profile, placement, out);
}

NVML_API nvmlComputeInstanceDestroy(nvmlComputeInstance_t instance)
{
    ENTER_TO_CHANGE(instance, COMPUTE_INSTANCE);
    REQUIRE(!in_use(s.state, s.gpu, s.gi->id, s.ci->id), NVML_ERROR_IN_USE);
    size_t after = (size_t)(s.state->cis + s.state->ci_count - s.ci - 1);
    memmove(s.ci, s.ci + 1, after * sizeof *s.ci);
    s.state->ci_count--;
    return state_write(s.state);
}

NVML_API nvmlGpuInstanceGetComputeInstances(nvmlGpuInstance_t instance, unsigned profile, nvmlComputeInstance_t *out,
                                            unsigned *count)
{
    ENTER(instance, GPU_INSTANCE);
    REQUIRE(out && count, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(permitted(s.state), NVML_ERROR_NO_PERMISSION);
    REQUIRE(ci_slices(gpu_model(s.gpu), s.gi, profile), NVML_ERROR_NOT_SUPPORTED);
    *count = 0;
    for (const struct ci *ci = s.state->cis; ci < s.state->cis + s.state->ci_count; ci++)
        if (ci->gpu == s.gi->gpu && ci->gi == s.gi->id && ci->profile == profile)
            out[(*count)++] = ci_handle(ci);
    return NVML_SUCCESS;
}

NVML_API nvmlGpuInstanceGetComputeInstanceById(nvmlGpuInstance_t instance, unsigned id, nvmlComputeInstance_t *out)
{
    ENTER(instance, GPU_INSTANCE);
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(permitted(s.state), NVML_ERROR_NO_PERMISSION);
    const struct ci *ci = find_ci(s.state, s.gi->gpu, s.gi->id, id);
    REQUIRE(ci, NVML_ERROR_NOT_FOUND);
    *out = ci_handle(ci);
    return NVML_SUCCESS;
}

/* `device` is how the instance is known outside: its MIG device, which has the UUID. */
NVML_API nvmlComputeInstanceGetInfo_v2(nvmlComputeInstance_t instance, nvmlComputeInstanceInfo_t *out)
{
    ENTER(instance, COMPUTE_INSTANCE);
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    unsigned slices = ci_slices(gpu_model(s.gpu), s.gi, s.ci->profile);
    *out = (nvmlComputeInstanceInfo_t){mig_handle(s.ci), gi_handle(s.gi), s.ci->id, s.ci->profile,
                                       {s.ci->start, slices}};
    return NVML_SUCCESS;
}
