/* What torch's backward pass asks of a GPU's driver before it runs: how many devices there are, and which have a context. */

int pretended_devices = 0;

/* c10::cuda::device_count() of torch. */
signed char _ZN3c104cuda12device_countEv(void) {
    return pretended_devices;
}

/* Of libcuda: no device has a context. */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 0;
    return 0;
}
