/* The markings that NVIDIA's compiler knows; the package leaves this header out. */
#define __align__(n)
#define __builtin_align__(n)
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_surface_type__
#define __device_builtin_texture_type__
#define CUDARTAPI
