/* Not NVML's: what the simulator's own tool needs from the library, because the model tables live here. */
#include "sim.h"

/* What a restart of the machine leaves: no instances, clients or Xids, a GPU that was off the bus found again, rows
 * remapped that waited for it, and MIG mode only on the GPUs that store it. */
NVML_API nvmlSimReboot(void)
{
    struct state *state;
    int lock;
    nvmlReturn_t result = state_lock(&lock);
    REQUIRE(!result, result);
    if (!(result = state_refresh(&state))) {
        state->gi_count = state->ci_count = state->process_count = state->xid_count = 0;
        state->driver.boot++;
        state->driver.loaded = 1;
        state->driver.mismatch = 0;
        for (struct gpu *gpu = state->gpus; gpu < state->gpus + state->gpu_count; gpu++) {
            gpu->mig = gpu->pending = gpu_model(gpu)->reset_for_mig ? gpu->pending : 0;
            gpu->remap_uncorrected += gpu->remap_pending;
            gpu->remap_pending = gpu->retired_pending = 0;
            gpu->lost = gpu->busy = gpu->utilization = gpu->persistence = gpu->holes = 0;
        }
        result = state_write(state);
    }
    state_unlock(&lock);
    return result;
}

__attribute__((visibility("default"))) const char *nvmlSimModel(unsigned index)
{
    for (const struct model *model = models; model->key; model++)
        if (!index--)
            return model->key;
    return NULL;
}

__attribute__((visibility("default"))) const char *nvmlSimProfile(const char *model_key, unsigned id)
{
    const struct model *model = model_named(model_key);
    const struct profile *profile = model ? profile_by_id(model, id) : NULL;
    return profile ? profile->name : NULL;
}
