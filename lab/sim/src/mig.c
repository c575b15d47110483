#define _GNU_SOURCE
#include "sim.h"

#include <stdio.h>
#include <string.h>

static bool has_mig(const struct session *s)
{
    return gpu_model(s->gpu)->profiles != NULL;
}

NVML_API nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned *current, unsigned *pending)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(current && pending, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(has_mig(&s), NVML_ERROR_NOT_SUPPORTED);
    *current = s.gpu->mig;
    *pending = s.gpu->pending;
    return NVML_SUCCESS;
}

/* The call succeeds even where the mode does not change: what came of it is in `activation`. */
NVML_API nvmlDeviceSetMigMode(nvmlDevice_t device, unsigned mode, nvmlReturn_t *activation)
{
    ENTER_TO_CHANGE(device, WHOLE_GPU);
    REQUIRE(activation && mode <= 1, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(has_mig(&s), NVML_ERROR_NOT_SUPPORTED);

    bool instances = false;
    for (unsigned i = 0; i < s.state->gi_count; i++)
        instances |= s.state->gis[i].gpu == s.gpu->minor;
    bool resets = gpu_model(s.gpu)->reset_for_mig;

    *activation = NVML_SUCCESS;
    if (mode != s.gpu->mig && (instances || in_use(s.state, s.gpu, NO_INSTANCE, NO_INSTANCE)))
        *activation = NVML_ERROR_IN_USE;
    else if (mode != s.gpu->mig && resets && s.gpu->passthrough)
        *activation = NVML_ERROR_RESET_REQUIRED;
    else
        s.gpu->mig = mode;
    /* Where a reset is needed the wish is kept for the next one; newer GPUs know no such wish. */
    s.gpu->pending = resets ? mode : s.gpu->mig;
    return state_write(s.state);
}

static nvmlReturn_t gi_profile_info(nvmlDevice_t device, unsigned enumeration, nvmlGpuInstanceProfileInfo_v2_t *out)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(out && enumeration < NVML_GPU_INSTANCE_PROFILE_COUNT, NVML_ERROR_INVALID_ARGUMENT);
    const struct profile *p = profile_by_enumeration(gpu_model(s.gpu), enumeration);
    REQUIRE(p, NVML_ERROR_NOT_SUPPORTED);
    *out = (nvmlGpuInstanceProfileInfo_v2_t){
        .version = out->version,
        .id = p->id,
        .sliceCount = p->slices,
        .instanceCount = p->max,
        .multiprocessorCount = p->sm,
        .copyEngineCount = p->copy,
        .decoderCount = p->decoders,
        .encoderCount = p->encoders,
        .jpegCount = p->jpeg,
        .ofaCount = p->ofa,
        .memorySizeMB = p->mib,
    };
    snprintf(out->name, sizeof out->name, "MIG %s", p->name);
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetGpuInstanceProfileInfo(nvmlDevice_t device, unsigned enumeration,
                                             nvmlGpuInstanceProfileInfo_t *out)
{
    nvmlGpuInstanceProfileInfo_v2_t full;
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    nvmlReturn_t result = gi_profile_info(device, enumeration, &full);
    if (!result)
        *out = (nvmlGpuInstanceProfileInfo_t){full.id, full.isP2pSupported, full.sliceCount, full.instanceCount,
                                              full.multiprocessorCount, full.copyEngineCount, full.decoderCount,
                                              full.encoderCount, full.jpegCount, full.ofaCount, full.memorySizeMB};
    return result;
}

NVML_API nvmlDeviceGetGpuInstanceProfileInfoV(nvmlDevice_t device, unsigned enumeration,
                                              nvmlGpuInstanceProfileInfo_v2_t *out)
{
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(out->version == NVML_STRUCT_VERSION(nvmlGpuInstanceProfileInfo_v2_t, 2),
            NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
    return gi_profile_info(device, enumeration, out);
}

/* What every call about placing instances asks first. */
static nvmlReturn_t need_profile(const struct session *s, unsigned id, const struct profile **profile)
{
    REQUIRE(has_mig(s) && s->gpu->mig, NVML_ERROR_NOT_SUPPORTED);
    *profile = profile_by_id(gpu_model(s->gpu), id);
    return *profile ? NVML_SUCCESS : NVML_ERROR_NOT_SUPPORTED;
}

NVML_API nvmlDeviceGetGpuInstancePossiblePlacements_v2(nvmlDevice_t device, unsigned id, nvmlPlacement_t *out,
                                                       unsigned *count)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(count, NVML_ERROR_INVALID_ARGUMENT);
    const struct profile *profile;
    nvmlReturn_t result = need_profile(&s, id, &profile);
    REQUIRE(!result, result);
    unsigned room = *count;
    *count = profile->starts;
    REQUIRE(out, NVML_SUCCESS);
    REQUIRE(room >= profile->starts, NVML_ERROR_INSUFFICIENT_SIZE);
    for (unsigned i = 0; i < profile->starts; i++)
        out[i] = (nvmlPlacement_t){profile->start[i], profile->size};
    return NVML_SUCCESS;
}

/* The memory slices taken, a bit each. */
static unsigned taken_slices(const struct session *s)
{
    unsigned taken = 0;
    for (const struct gi *gi = s->state->gis; gi < s->state->gis + s->state->gi_count; gi++)
        if (gi->gpu == s->gpu->minor)
            taken |= ((1u << profile_by_id(gpu_model(s->gpu), gi->profile)->size) - 1) << gi->start;
    return taken;
}

static bool media_taken(const struct session *s)
{
    for (const struct gi *gi = s->state->gis; gi < s->state->gis + s->state->gi_count; gi++)
        if (gi->gpu == s->gpu->minor && takes_media(profile_by_id(gpu_model(s->gpu), gi->profile)))
            return true;
    return false;
}

static bool fits(const struct profile *profile, unsigned start, unsigned taken)
{
    return !(taken & ((1u << profile->size) - 1) << start);
}

NVML_API nvmlDeviceGetGpuInstanceRemainingCapacity(nvmlDevice_t device, unsigned id, unsigned *count)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(count, NVML_ERROR_INVALID_ARGUMENT);
    const struct profile *profile;
    nvmlReturn_t result = need_profile(&s, id, &profile);
    REQUIRE(!result, result);
    unsigned taken = taken_slices(&s);
    *count = 0;
    for (unsigned i = 0; i < profile->starts; i++)
        *count += fits(profile, profile->start[i], taken); /* one profile's placements never overlap each other */
    if (takes_media(profile) && *count)
        *count = !media_taken(&s);
    return NVML_SUCCESS;
}

/* Instance ids come from a range for each size. Within it they mostly follow the placement, but not for the halves
 * (seen on an A100: id 1 at 4, id 2 at 0), so nobody can tell the placement from the id. */
static unsigned choose_id(const struct session *s, const struct profile *profile, unsigned start)
{
    unsigned range = gpu_model(s->gpu)->memory_slices / profile->size, base = range - 1;
    unsigned id = base + (range == 2 && profile->slices == 3 ? !(start / profile->size) : start / profile->size);
    for (unsigned tried = 0; tried < range && find_gi(s->state, s->gpu->minor, id); tried++)
        id = base + (id + 1 - base) % range;
    return id;
}

static struct gi *add_gi(struct state *state, struct gi new)
{
    unsigned at = state->gi_count++;
    for (; at && (state->gis[at - 1].gpu > new.gpu ||
                  (state->gis[at - 1].gpu == new.gpu && state->gis[at - 1].id > new.id)); at--)
        state->gis[at] = state->gis[at - 1];
    state->gis[at] = new;
    return &state->gis[at];
}

static nvmlReturn_t create(nvmlDevice_t device, unsigned id, const nvmlPlacement_t *wanted, nvmlGpuInstance_t *out)
{
    ENTER_TO_CHANGE(device, WHOLE_GPU);
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(has_mig(&s) && s.gpu->mig, NVML_ERROR_NOT_SUPPORTED);
    const struct profile *profile = profile_by_id(gpu_model(s.gpu), id);
    REQUIRE(profile, NVML_ERROR_INVALID_ARGUMENT);

    /* Left to itself the driver fills from the top with small instances, from the bottom with large ones. */
    unsigned taken = taken_slices(&s), start = NO_INSTANCE, known = !wanted;
    for (unsigned i = 0; i < profile->starts; i++) {
        unsigned candidate = profile->start[profile->slices < 3 ? profile->starts - 1 - i : i];
        if (wanted && (wanted->start != candidate || wanted->size != profile->size))
            continue;
        known = 1;
        if (start == NO_INSTANCE && fits(profile, candidate, taken))
            start = candidate;
    }
    REQUIRE(known, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(start != NO_INSTANCE, NVML_ERROR_INSUFFICIENT_RESOURCES);
    REQUIRE(!takes_media(profile) || !media_taken(&s), NVML_ERROR_INSUFFICIENT_RESOURCES);
    REQUIRE(s.state->gi_count < MAX_GIS, NVML_ERROR_INSUFFICIENT_RESOURCES);

    struct gi new = {.gpu = s.gpu->minor, .id = choose_id(&s, profile, start), .profile = id, .start = start};
    *out = gi_handle(add_gi(s.state, new));
    return state_write(s.state);
}

NVML_API nvmlDeviceCreateGpuInstance(nvmlDevice_t device, unsigned id, nvmlGpuInstance_t *out)
{
    return create(device, id, NULL, out);
}

NVML_API nvmlDeviceCreateGpuInstanceWithPlacement(nvmlDevice_t device, unsigned id, const nvmlPlacement_t *placement,
                                                  nvmlGpuInstance_t *out)
{
    REQUIRE(placement, NVML_ERROR_INVALID_ARGUMENT);
    return create(device, id, placement, out);
}

NVML_API nvmlGpuInstanceDestroy(nvmlGpuInstance_t instance)
{
    ENTER_TO_CHANGE(instance, GPU_INSTANCE);
    for (const struct ci *ci = s.state->cis; ci < s.state->cis + s.state->ci_count; ci++)
        REQUIRE(ci->gpu != s.gi->gpu || ci->gi != s.gi->id, NVML_ERROR_IN_USE);
    REQUIRE(!in_use(s.state, s.gpu, s.gi->id, NO_INSTANCE), NVML_ERROR_IN_USE);
    size_t after = (size_t)(s.state->gis + s.state->gi_count - s.gi - 1);
    memmove(s.gi, s.gi + 1, after * sizeof *s.gi);
    s.state->gi_count--;
    return state_write(s.state);
}

NVML_API nvmlDeviceGetGpuInstances(nvmlDevice_t device, unsigned id, nvmlGpuInstance_t *out, unsigned *count)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(out && count, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(has_mig(&s) && s.gpu->mig, NVML_ERROR_NOT_SUPPORTED);
    REQUIRE(permitted(s.state), NVML_ERROR_NO_PERMISSION);
    REQUIRE(profile_by_id(gpu_model(s.gpu), id), NVML_ERROR_INVALID_ARGUMENT);
    *count = 0;
    for (const struct gi *gi = s.state->gis; gi < s.state->gis + s.state->gi_count; gi++)
        if (gi->gpu == s.gpu->minor && gi->profile == id)
            out[(*count)++] = gi_handle(gi);
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetGpuInstanceById(nvmlDevice_t device, unsigned id, nvmlGpuInstance_t *out)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(has_mig(&s) && s.gpu->mig, NVML_ERROR_NOT_SUPPORTED);
    REQUIRE(permitted(s.state), NVML_ERROR_NO_PERMISSION);
    const struct gi *gi = find_gi(s.state, s.gpu->minor, id);
    REQUIRE(gi, NVML_ERROR_NOT_FOUND);
    *out = gi_handle(gi);
    return NVML_SUCCESS;
}

NVML_API nvmlGpuInstanceGetInfo(nvmlGpuInstance_t instance, nvmlGpuInstanceInfo_t *out)
{
    ENTER(instance, GPU_INSTANCE);
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    unsigned size = profile_by_id(gpu_model(s.gpu), s.gi->profile)->size;
    *out = (nvmlGpuInstanceInfo_t){gpu_handle(s.gpu), s.gi->id, s.gi->profile, {s.gi->start, size}};
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, unsigned *count)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(count, NVML_ERROR_INVALID_ARGUMENT);
    *count = s.gpu->mig ? gpu_model(s.gpu)->max_mig_devices : 0;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, unsigned index, nvmlDevice_t *mig)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(mig, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(has_mig(&s) && s.gpu->mig, NVML_ERROR_NOT_SUPPORTED);
    REQUIRE(index < gpu_model(s.gpu)->max_mig_devices, NVML_ERROR_INVALID_ARGUMENT);
    const struct ci *ci = mig_at(&s, index);
    REQUIRE(ci, NVML_ERROR_NOT_FOUND);
    *mig = mig_handle(ci);
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceIsMigDeviceHandle(nvmlDevice_t device, unsigned *is_mig)
{
    ENTER(device, ANY_DEVICE);
    REQUIRE(is_mig, NVML_ERROR_INVALID_ARGUMENT);
    *is_mig = s.ci != NULL;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t mig, nvmlDevice_t *device)
{
    ENTER(mig, MIG_DEVICE);
    REQUIRE(device, NVML_ERROR_INVALID_ARGUMENT);
    *device = gpu_handle(s.gpu);
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetGpuInstanceId(nvmlDevice_t mig, unsigned *id)
{
    ENTER(mig, MIG_DEVICE);
    REQUIRE(id, NVML_ERROR_INVALID_ARGUMENT);
    *id = s.gi->id;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetComputeInstanceId(nvmlDevice_t mig, unsigned *id)
{
    ENTER(mig, MIG_DEVICE);
    REQUIRE(id, NVML_ERROR_INVALID_ARGUMENT);
    *id = s.ci->id;
    return NVML_SUCCESS;
}
