# chunkattn_warnings(<target>): the warnings its C++ sources are held to; CMAKE_COMPILE_WARNING_AS_ERROR makes them errors.
function(chunkattn_warnings target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANG_AND_ID:CXX,GNU,Clang,AppleClang>:-Wall;-Wextra>)
endfunction()
