#define _GNU_SOURCE
#include "sim.h"

#include <stdlib.h>
#include <time.h>

NVML_API nvmlDeviceGetRemappedRows(nvmlDevice_t device, unsigned *corrected, unsigned *uncorrected, unsigned *pending,
                                   unsigned *failed)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(corrected && uncorrected && pending && failed, NVML_ERROR_INVALID_ARGUMENT);
    *corrected = s.gpu->remap_corrected;
    *uncorrected = s.gpu->remap_uncorrected;
    *pending = s.gpu->remap_pending;
    *failed = s.gpu->remap_failed;
    return NVML_SUCCESS;
}

/* One bank a row pair; a failed remap means that one bank has no spare rows left. */
NVML_API nvmlDeviceGetRowRemapperHistogram(nvmlDevice_t device, nvmlRowRemapperHistogramValues_t *out)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(out, NVML_ERROR_INVALID_ARGUMENT);
    unsigned used = s.gpu->remap_corrected + s.gpu->remap_uncorrected;
    *out = (nvmlRowRemapperHistogramValues_t){.high = used, .none = s.gpu->remap_failed};
    out->max = 640 - out->high - out->none;
    return NVML_SUCCESS;
}

/* Pages are retired for one of two causes; the simulator books them all under the second, double-bit errors. */
static nvmlReturn_t retired(nvmlDevice_t device, unsigned cause, unsigned *count, nvmlU64 *pages, nvmlU64 *times)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(count && cause <= 1, NVML_ERROR_INVALID_ARGUMENT);
    unsigned found = cause == 1 ? s.gpu->retired : 0, room = pages ? *count : 0;
    *count = found;
    REQUIRE(found <= room, NVML_ERROR_INSUFFICIENT_SIZE);
    for (unsigned i = 0; i < found; i++) {
        pages[i] = 0x1000ULL * (i + 1);
        if (times)
            times[i] = 1700000000ULL + i;
    }
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetRetiredPages(nvmlDevice_t device, unsigned cause, unsigned *count, nvmlU64 *pages)
{
    return retired(device, cause, count, pages, NULL);
}

NVML_API nvmlDeviceGetRetiredPages_v2(nvmlDevice_t device, unsigned cause, unsigned *count, nvmlU64 *pages,
                                      nvmlU64 *times)
{
    return retired(device, cause, count, pages, times);
}

NVML_API nvmlDeviceGetRetiredPagesPendingStatus(nvmlDevice_t device, unsigned *pending)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(pending, NVML_ERROR_INVALID_ARGUMENT);
    *pending = s.gpu->retired_pending;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetEccMode(nvmlDevice_t device, unsigned *current, unsigned *pending)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(current && pending, NVML_ERROR_INVALID_ARGUMENT);
    *current = *pending = 1;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, unsigned uncorrected, unsigned aggregate, nvmlU64 *count)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(count && uncorrected <= 1 && aggregate <= 1, NVML_ERROR_INVALID_ARGUMENT);
    *count = uncorrected ? s.gpu->ecc_uncorrected : s.gpu->ecc_corrected;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetTemperature(nvmlDevice_t device, unsigned sensor, unsigned *celsius)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(celsius && sensor == 0, NVML_ERROR_INVALID_ARGUMENT);
    *celsius = s.gpu->temperature;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned *milliwatts)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(milliwatts, NVML_ERROR_INVALID_ARGUMENT);
    *milliwatts = gpu_model(s.gpu)->watts * (150 + s.gpu->utilization * 8); /* 15 % idle, 95 % at full load */
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned *milliwatts)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(milliwatts, NVML_ERROR_INVALID_ARGUMENT);
    *milliwatts = gpu_model(s.gpu)->watts * 1000;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetPowerManagementLimit(nvmlDevice_t device, unsigned *milliwatts)
{
    return nvmlDeviceGetEnforcedPowerLimit(device, milliwatts);
}

/* An event set tells what happens after a GPU was registered with it: Xids, by the numbers they were given. */
struct nvmlEventSet_st {
    uint64_t since[MAX_GPUS]; /* by minor; 0: not registered */
};

NVML_API nvmlEventSetCreate(nvmlEventSet_t *set)
{
    SESSION(s);
    nvmlReturn_t result = session_open(&s);
    REQUIRE(!result, result);
    REQUIRE(set, NVML_ERROR_INVALID_ARGUMENT);
    *set = calloc(1, sizeof **set);
    return *set ? NVML_SUCCESS : NVML_ERROR_MEMORY;
}

NVML_API nvmlEventSetFree(nvmlEventSet_t set)
{
    REQUIRE(set, NVML_ERROR_INVALID_ARGUMENT);
    free(set);
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, nvmlU64 *types)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(types, NVML_ERROR_INVALID_ARGUMENT);
    *types = NVML_EVENT_XID_CRITICAL_ERROR;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceRegisterEvents(nvmlDevice_t device, nvmlU64 types, nvmlEventSet_t set)
{
    ENTER(device, WHOLE_GPU);
    REQUIRE(set, NVML_ERROR_INVALID_ARGUMENT);
    REQUIRE(!(types & ~(nvmlU64)NVML_EVENT_XID_CRITICAL_ERROR), NVML_ERROR_NOT_SUPPORTED);
    if (types)
        set->since[s.gpu->minor] = s.state->driver.next;
    return NVML_SUCCESS;
}

static nvmlReturn_t next_event(nvmlEventSet_t set, nvmlEventData_t *event)
{
    SESSION(s);
    nvmlReturn_t result = session_open(&s);
    REQUIRE(!result, result);
    for (const struct xid *xid = s.state->xids; xid < s.state->xids + s.state->xid_count; xid++) {
        struct gpu *gpu = find_gpu(s.state, xid->gpu);
        if (!gpu || !set->since[gpu->minor] || xid->number < set->since[gpu->minor])
            continue;
        set->since[gpu->minor] = xid->number + 1;
        *event = (nvmlEventData_t){gpu_handle(gpu), NVML_EVENT_XID_CRITICAL_ERROR, xid->code, NO_INSTANCE, NO_INSTANCE};
        return NVML_SUCCESS;
    }
    for (const struct gpu *gpu = s.state->gpus; gpu < s.state->gpus + s.state->gpu_count; gpu++)
        if (set->since[gpu->minor] && gpu->lost)
            return NVML_ERROR_GPU_IS_LOST;
    return NVML_ERROR_TIMEOUT;
}

NVML_API nvmlEventSetWait_v2(nvmlEventSet_t set, nvmlEventData_t *event, unsigned timeout_ms)
{
    REQUIRE(set && event, NVML_ERROR_INVALID_ARGUMENT);
    const unsigned step_ms = 10;
    for (unsigned waited = 0;; waited += step_ms) {
        nvmlReturn_t result = next_event(set, event);
        if (result != NVML_ERROR_TIMEOUT || waited >= timeout_ms)
            return result;
        nanosleep(&(struct timespec){0, step_ms * 1000000L}, NULL);
    }
}
