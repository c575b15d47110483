#define _GNU_SOURCE
#include "sim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    nvmlReturn_t code;
    const char *text;
} errors[] = {
    {NVML_SUCCESS, "The operation was successful"},
    {NVML_ERROR_UNINITIALIZED, "Uninitialized"},
    {NVML_ERROR_INVALID_ARGUMENT, "Invalid Argument"},
    {NVML_ERROR_NOT_SUPPORTED, "Not Supported"},
    {NVML_ERROR_NO_PERMISSION, "Insufficient Permissions"},
    {NVML_ERROR_NOT_FOUND, "Not Found"},
    {NVML_ERROR_INSUFFICIENT_SIZE, "Insufficient Size"},
    {NVML_ERROR_DRIVER_NOT_LOADED, "Driver Not Loaded"},
    {NVML_ERROR_TIMEOUT, "Timeout"},
    {NVML_ERROR_GPU_IS_LOST, "GPU is lost"},
    {NVML_ERROR_RESET_REQUIRED, "GPU requires reset"},
    {NVML_ERROR_LIB_RM_VERSION_MISMATCH, "Driver/library version mismatch"},
    {NVML_ERROR_IN_USE, "In use by another client"},
    {NVML_ERROR_MEMORY, "Insufficient Memory"},
    {NVML_ERROR_INSUFFICIENT_RESOURCES, "Insufficient Resources"},
    {NVML_ERROR_ARGUMENT_VERSION_MISMATCH, "Argument version mismatch"},
};

__attribute__((visibility("default"))) const char *nvmlErrorString(nvmlReturn_t code)
{
    for (size_t i = 0; i < sizeof(errors) / sizeof(*errors); i++)
        if (errors[i].code == code)
            return errors[i].text;
    return "Unknown Error";
}

NVML_API nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    SESSION(s);
    nvmlReturn_t result = session_open(&s);
    return result ? result : copy_text(version, length, s.state->driver.version);
}

NVML_API nvmlSystemGetNVMLVersion(char *version, unsigned length)
{
    SESSION(s);
    nvmlReturn_t result = session_open(&s);
    REQUIRE(!result, result);
    char text[96];
    snprintf(text, sizeof text, "13.%s", s.state->driver.version);
    return copy_text(version, length, text);
}

NVML_API nvmlSystemGetCudaDriverVersion(int *version)
{
    static const struct {
        int branch, cuda;
    } cuda[] = {{580, 13000}, {575, 12090}, {570, 12080}, {565, 12070}, {560, 12060}, {555, 12050}, {550, 12040},
                {535, 12020}, {525, 12000}, {510, 11060}, {470, 11040}, {0, 11000}};
    SESSION(s);
    nvmlReturn_t result = session_open(&s);
    REQUIRE(!result, result);
    REQUIRE(version, NVML_ERROR_INVALID_ARGUMENT);
    size_t i = 0;
    while (atoi(s.state->driver.version) < cuda[i].branch)
        i++;
    *version = cuda[i].cuda;
    return NVML_SUCCESS;
}

NVML_API nvmlSystemGetCudaDriverVersion_v2(int *version) { return nvmlSystemGetCudaDriverVersion(version); }

NVML_API nvmlSystemGetProcessName(unsigned pid, char *name, unsigned length)
{
    SESSION(s);
    nvmlReturn_t result = session_open(&s);
    REQUIRE(!result, result);
    REQUIRE(name && length, NVML_ERROR_INVALID_ARGUMENT);
    char path[32];
    snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
    FILE *file = fopen(path, "re");
    REQUIRE(file, NVML_ERROR_NOT_FOUND);
    size_t got = fread(name, 1, length - 1, file);
    fclose(file);
    name[got] = '\0'; /* arguments are separated by NUL: what is left is the program */
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetCount_v2(unsigned *count)
{
    SESSION(s);
    nvmlReturn_t result = session_open(&s);
    REQUIRE(!result, result);
    REQUIRE(count, NVML_ERROR_INVALID_ARGUMENT);
    *count = s.state->gpu_count;
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

static nvmlReturn_t answer(const struct gpu *gpu, nvmlDevice_t *device)
{
    REQUIRE(!gpu->lost, NVML_ERROR_GPU_IS_LOST);
    *device = gpu_handle(gpu);
    return NVML_SUCCESS;
}

NVML_API nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t *device)
{
    SESSION(s);
    nvmlReturn_t result = session_open(&s);
    REQUIRE(!result, result);
    REQUIRE(device && index < s.state->gpu_count, NVML_ERROR_INVALID_ARGUMENT);
    return answer(&s.state->gpus[index], device);
}

NVML_API nvmlDeviceGetHandleByIndex(unsigned index, nvmlDevice_t *device)
{
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

/* A MIG device has two names: its UUID, and the older MIG-<GPU UUID>/<GPU instance>/<compute instance>. */
static bool is_named(const struct gpu *gpu, const struct ci *ci, const char *name)
{
    char old[96];
    snprintf(old, sizeof old, "MIG-%s/%u/%u", gpu->uuid, ci->gi, ci->id);
    return ci->gpu == gpu->minor && (!strcmp(ci->uuid, name) || !strcmp(old, name));
}

NVML_API nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    SESSION(s);
    nvmlReturn_t result = session_open(&s);
    REQUIRE(!result, result);
    REQUIRE(uuid && device, NVML_ERROR_INVALID_ARGUMENT);
    for (struct gpu *gpu = s.state->gpus; gpu < s.state->gpus + s.state->gpu_count; gpu++) {
        if (!strcmp(gpu->uuid, uuid))
            return answer(gpu, device);
        for (struct ci *ci = s.state->cis; ci < s.state->cis + s.state->ci_count; ci++) {
            if (!is_named(gpu, ci, uuid))
                continue;
            REQUIRE(!gpu->lost, NVML_ERROR_GPU_IS_LOST);
            *device = mig_handle(ci);
            return NVML_SUCCESS;
        }
    }
    return NVML_ERROR_NOT_FOUND;
}

NVML_API nvmlDeviceGetHandleBySerial(const char *serial, nvmlDevice_t *device)
{
    SESSION(s);
    nvmlReturn_t result = session_open(&s);
    REQUIRE(!result, result);
    REQUIRE(serial && device, NVML_ERROR_INVALID_ARGUMENT);
    for (struct gpu *gpu = s.state->gpus; gpu < s.state->gpus + s.state->gpu_count; gpu++)
        if (!strcmp(gpu->serial, serial))
            return answer(gpu, device);
    return NVML_ERROR_NOT_FOUND;
}

/* Bus ids are written with four or eight digits of domain, in either case. */
static bool same_bus(const char *one, const char *other)
{
    unsigned a[4], b[4];
    return sscanf(one, "%x:%x:%x.%x", a, a + 1, a + 2, a + 3) >= 3 &&
           sscanf(other, "%x:%x:%x.%x", b, b + 1, b + 2, b + 3) >= 3 && !memcmp(a, b, 3 * sizeof(*a));
}

NVML_API nvmlDeviceGetHandleByPciBusId_v2(const char *bus, nvmlDevice_t *device)
{
    SESSION(s);
    nvmlReturn_t result = session_open(&s);
    REQUIRE(!result, result);
    REQUIRE(bus && device, NVML_ERROR_INVALID_ARGUMENT);
    for (struct gpu *gpu = s.state->gpus; gpu < s.state->gpus + s.state->gpu_count; gpu++)
        if (same_bus(gpu->pci, bus))
            return answer(gpu, device);
    return NVML_ERROR_NOT_FOUND;
}
