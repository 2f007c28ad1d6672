# chunkattn_read_list(<file> <variable>): the lines of a file, without comments, as a list. Re-run when the file changes.
function(chunkattn_read_list file variable)
  file(STRINGS ${file} lines REGEX "^[^#]")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
  set(${variable} ${lines} PARENT_SCOPE)
endfunction()
