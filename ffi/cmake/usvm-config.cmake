# usvm::usvm, the shared library, and usvm::usvm_static. Found relative to this file, so the tree may be moved.
get_filename_component(_usvm_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET usvm::usvm)
  add_library(usvm::usvm SHARED IMPORTED)
  set_target_properties(usvm::usvm PROPERTIES
    IMPORTED_LOCATION "${_usvm_prefix}/lib/libusvm.so"
    IMPORTED_SONAME "libusvm.so.0"
    INTERFACE_INCLUDE_DIRECTORIES "${_usvm_prefix}/include")
endif()

if(NOT TARGET usvm::usvm_static)
  add_library(usvm::usvm_static STATIC IMPORTED)
  set_target_properties(usvm::usvm_static PROPERTIES
    IMPORTED_LOCATION "${_usvm_prefix}/lib/libusvm.a"
    INTERFACE_INCLUDE_DIRECTORIES "${_usvm_prefix}/include"
    INTERFACE_LINK_LIBRARIES "gcc_s;pthread;dl;m")
endif()

unset(_usvm_prefix)
